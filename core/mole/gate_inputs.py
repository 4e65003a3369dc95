"""Gate inputs: the features that gates read from the text, from a layer's input or from the experts' outputs.

Source: arXiv:2404.13628 eq. 5 for ``flat`` and ``experts``; ``text``, ``hidden`` and ``token`` are our alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..errors import MergeError
from .concepts import at_least_float32
from .gates import Gate, Reads, rms_normalised
from .stack import Stack
from .texts import TextPositions

TEXT_ARGUMENTS = ("encoder_hidden_states", "context")  # models' names for their text conditioning (B, tokens, F)


def layer_input_features(x: Tensor, reads: Reads, positions: TextPositions, *, image: bool, module: str) -> Tensor:
    """The input of a layer or block, with every position normalised by its root mean square.

    Args:
        x: ``(B, .., F)``; ``(B, F, ..)`` for an image. image: Whether channels come first.
        reads: ``hidden`` or ``token``.
        positions: The positions of each text to average over.
        module: Name for error messages.

    Returns:
        ``(B, F)``, the mean over positions (``hidden``), or ``(B, T, F)``, each position (``token``).

    Raises:
        MergeError: Gates per token at an image.
    """
    if reads == "token":
        if image:
            raise MergeError(
                "Gates per token read sequences, but this layer's input is an image.",
                module=module,
                remedy="choose gates that read hidden",
            )
        return positions.by_position(rms_normalised(x))
    if image:
        f = rms_normalised(x, 1)
        return f.flatten(2).mean(2) if f.ndim > 2 else f
    return positions.mean(rms_normalised(x))


def expert_features(
    stack: Stack, z: Tensor, experts: int, reads: Reads, positions: TextPositions
) -> tuple[Tensor, Tensor]:
    """The experts' outputs at a layer, concatenated and normalised, in rank space: see `Stack.normalised_outputs`.

    Args:
        stack: The layer's experts. z: ``D x``, computed by `Stack.down`.
        experts: Number of experts `N`.
        reads: ``experts`` or ``flat``. positions: The positions of each text to average over (``experts``).

    Returns:
        Features ``(B, F)``, the mean over positions (``experts``) or all positions in a row (``flat``), and the expert
        ``(F,)`` that each feature belongs to.
    """
    E, owner = stack.by_expert(stack.normalised_outputs(z, experts))  # (B, T, R)
    if reads == "flat":
        return E.flatten(1), owner.repeat(E.shape[1])
    return positions.mean(E if z.ndim > 2 else E[:, 0]), owner


def block_expert_features(outputs: Sequence[Tensor], reads: Reads, positions: TextPositions) -> tuple[Tensor, Tensor]:
    """The experts' outputs of a whole block, concatenated and normalised; otherwise like `expert_features`.

    Args:
        outputs: ``E_i(x) = F_i(x) - F(x)``, ``(B, T, d)`` per expert.
        reads: ``experts`` or ``flat``. positions: The positions of each text to average over (``experts``).
    """
    E = rms_normalised(torch.cat([at_least_float32(E_i) for E_i in outputs], -1))  # (B, T, N d)
    owner = torch.arange(len(outputs), device=E.device).repeat_interleave(outputs[0].shape[-1])
    if reads == "flat":
        return E.flatten(1), owner.repeat(E.shape[1])
    return positions.mean(E), owner


def check_size(features: Tensor, gate: Gate, scope: str, reads: Reads) -> None:
    """Raise MergeError unless a gate was trained with as many features."""
    if features.shape[-1] != gate.features:
        raise MergeError(
            "A gate reads an input of another size than it was trained with.",
            module=scope or "(network)",
            expected=f"{gate.features} features",
            found=features.shape[-1],
            remedy="sample at the image size the gates were trained with: they read every position apart (flat)"
            if reads == "flat"
            else "use the gates with the base model they were trained on",
        )


def missing_text() -> MergeError:
    """The error for gates that read text, on a model that was called without a text conditioning."""
    return MergeError(
        "The gates read the text conditioning, and this model got none.",
        expected=f"an argument {' or '.join(TEXT_ARGUMENTS)}",
        remedy="train gates that read hidden or experts",
    )
