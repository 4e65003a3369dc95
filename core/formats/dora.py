"""DoRA: the update of a layer whose weights are rescaled to learnt magnitudes, from the base model's weights.

``W' = m * (W + D) / |W + D|`` with the LoRA's delta D; the norm is taken for each output (PEFT, ai-toolkit, LyCORIS
with ``wd_on_output``) or for each input (kohya, LyCORIS), as the shape of m says. The update ``W' - W`` has full rank
in general.

Source: arXiv:2402.09353, equation 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import FormatError

DORA_REMEDY = (
    "give the base model it was trained on, and a rank: --base FILE_OR_FOLDER --convert-rank 32 (base=.., "
    "convert_rank=32 in Python)"
)


def dora_delta(weight: Tensor, delta: Tensor, magnitude: Tensor, kernel: tuple[int, ...] = ()) -> Tensor:
    """``W' - W``, ``(d_out, d_in)`` float64.

    Args:
        weight: W, ``(d_out, d_in)`` float64, with ``d_in = channels * prod(kernel)``.
        delta: D of the same shape.
        magnitude: One value per output, ``(d_out,)``, ``(d_out, 1, ..)`` or PEFT's ``(1, d_out, 1, ..)``; or one per
            input channel, ``(1, channels, ..)``.
        kernel: Kernel size of a convolution.

    Raises:
        FormatError: A magnitude of another shape.
    """
    d_out, d_in = weight.shape
    channels = d_in // math.prod(kernel)
    whole = (weight + delta).reshape(d_out, channels, -1)
    m = magnitude.double()
    eps = torch.finfo(torch.float32).eps
    if _is_per_output(tuple(m.shape), d_out, channels):
        norm = whole.flatten(1).norm(dim=1).reshape(-1, 1, 1)
        m = m.reshape(-1, 1, 1)
    elif m.numel() == channels and m.shape[0] == 1:
        norm = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, 1)
        m = m.reshape(1, -1, 1)
    else:
        raise FormatError(
            "The magnitudes of a DoRA do not fit its layer.",
            expected=f"({d_out},) or ({d_out}, 1), one per output, or (1, {channels}), one per input",
            found=tuple(magnitude.shape),
        )
    return (m / (norm + eps) * whole).reshape(d_out, d_in) - weight


def _is_per_output(shape: tuple[int, ...], d_out: int, channels: int) -> bool:
    if math.prod(shape) != d_out:
        return False
    # (1, n) is one per input where both sides have n; PEFT's convolutions have (1, d_out, 1, ..)
    return shape[0] == d_out or (d_out != channels and len(shape) > 2)
