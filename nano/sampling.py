"""Sampling from the small model: Euler steps along the flow, with classifier-free guidance."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .model import SIDE, Prompts, predict
from .vae import CHANNELS

STEPS, GUIDANCE, SHIFT = 12, 3.0, 3.0


def times(steps: int = STEPS) -> list[float]:
    """Return the start times of the steps, from 1 down, rounded to thousandths as by ComfyUI's scheduler "simple"."""
    return [1 - int(1000 * i / steps) / 1000 for i in range(steps)]


def sigmas(steps: int = STEPS, shift: float = SHIFT) -> Tensor:
    """Return noise levels ``(steps + 1,)`` from 1 to 0: the times with SD3's shift."""
    t = torch.tensor([*times(steps), 0.0])
    return shift * t / (1 + (shift - 1) * t)


def noise(count: int, seed: int, *, width: int = SIDE, channels: int = CHANNELS) -> Tensor:
    return torch.randn(count, channels, SIDE, width, generator=torch.Generator().manual_seed(seed))


def first_half(_: Mapping[str, Any], batch: int) -> range:
    """Return the rows of a batch of `sample` that hold prompts; the second half holds the empty prompt."""
    return range(batch // 2)


@torch.no_grad()
def sample(
    transformer: Any, prompts: Prompts, texts: list[str], seed: int, *, steps: int = STEPS, guidance: float = GUIDANCE,
    batch: int = 64, shift: float = SHIFT, width: int = SIDE,
    channels: int = CHANNELS,
) -> Tensor:  # fmt: skip
    """Sample latents ``(len(texts), channels, 8, width)``, float32, with guidance against the empty prompt.

    Args:
        transformer: Transformer, with or without a mixture attached.
        prompts: Prompt encoder.
        texts: Prompts.
        seed: Random seed of the noise.
        steps: Number of Euler steps.
        guidance: Guidance scale; 1 is no guidance.
        batch: Prompts per batch; the model's batches are twice as large.
        shift: Shift of the noise levels, see `sigmas`.
        width: Width of the latents.
        channels: Channels of the latents.
    """
    start = noise(len(texts), seed, width=width, channels=channels)
    samples: list[Tensor] = []
    for i in range(0, len(texts), batch):
        x = start[i : i + batch]
        hidden, pooled = prompts([*texts[i : i + batch], *[""] * len(x)])
        levels = sigmas(steps, shift)
        for sigma, following in pairwise(levels):
            flow = predict(transformer, torch.cat([x, x]), sigma.expand(2 * len(x)), hidden, pooled)
            conditional, unconditional = flow.chunk(2)
            x = x + (following - sigma) * (unconditional + guidance * (conditional - unconditional))
        samples.append(x)
    return torch.cat(samples)
