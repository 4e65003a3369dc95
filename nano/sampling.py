"""Pictures from the small model: Euler steps of the flow, with guidance."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .model import SIDE, Prompts, predict

STEPS, GUIDANCE, SHIFT = 12, 3.0, 3.0


def times(steps: int = STEPS) -> list[float]:
    """Where the steps start, from 1 down, in thousandths, as ComfyUI's scheduler "simple" has them."""
    return [1 - int(1000 * i / steps) / 1000 for i in range(steps)]


def sigmas(steps: int = STEPS, shift: float = SHIFT) -> Tensor:
    """``(steps + 1,)`` noise levels from 1 to 0: the times, shifted as SD3 shifts them."""
    t = torch.tensor([*times(steps), 0.0])
    return shift * t / (1 + (shift - 1) * t)


def noise(count: int, seed: int) -> Tensor:
    return torch.randn(count, 16, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


def first_half(_: Mapping[str, Any], batch: int) -> range:
    """The prompts' rows of the batches that `sample` makes: the empty prompt's come behind them."""
    return range(batch // 2)


@torch.no_grad()
def sample(
    transformer: Any, prompts: Prompts, texts: list[str], seed: int, *, steps: int = STEPS, guidance: float = GUIDANCE,
    batch: int = 64, shift: float = SHIFT,
) -> Tensor:  # fmt: skip
    """Latents ``(len(texts), 16, 8, 8)``, float32, guided by the empty prompt."""
    start = noise(len(texts), seed)
    found: list[Tensor] = []
    for i in range(0, len(texts), batch):
        x = start[i : i + batch]
        hidden, pooled = prompts([*texts[i : i + batch], *[""] * len(x)])
        levels = sigmas(steps, shift)
        for sigma, following in pairwise(levels):
            flow = predict(transformer, torch.cat([x, x]), sigma.expand(2 * len(x)), hidden, pooled)
            asked, plain = flow.chunk(2)
            x = x + (following - sigma) * (plain + guidance * (asked - plain))
        found.append(x)
    return torch.cat(found)
