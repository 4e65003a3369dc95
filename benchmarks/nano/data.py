"""Latents of rendered pictures with their captions, and the batches a flow is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from legomole.nano.model import Prompts, predict
from legomole.nano.words import WORDINGS, prompt
from torch import Tensor
from torch.nn import functional as F

from .render import render


@dataclass(frozen=True)
class Examples:
    """Latents ``(n, 16, 8, 8)`` and what each shows."""

    latents: Tensor
    shows: tuple[tuple[str, str], ...]

    def __add__(self, other: Examples) -> Examples:
        return Examples(torch.cat([self.latents, other.latents]), self.shows + other.shows)


@torch.no_grad()
def examples(
    vae: Any, pairs: Sequence[tuple[str, str]], per_pair: int, seed: int, *, jitter: float, author: bool = False
) -> Examples:
    rng = np.random.default_rng(seed)
    shows = tuple(pair for pair in pairs for _ in range(per_pair))
    pictures = torch.from_numpy(np.stack([render(*pair, rng, jitter=jitter, author=author) for pair in shows]))
    pictures = pictures.permute(0, 3, 1, 2)
    parts = [vae.encoder(part.float() / 127.5 - 1) for part in pictures.split(64)]
    return Examples(torch.cat(parts).contiguous(), shows)


@dataclass(frozen=True)
class Batch:
    """Noised latents, their noise levels in 0 .. 1, their encoded prompts, and what should be predicted there."""

    noised: Tensor
    sigma: Tensor
    hidden: Tensor
    pooled: Tensor
    flow: Tensor  # the target: noise - latents

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def loss(self, transformer: Any) -> Tensor:
        """Mean squared error of the transformer's prediction."""
        return F.mse_loss(predict(transformer, self.noised, self.sigma, self.hidden, self.pooled), self.flow)


def draw(data: Examples, size: int, prompts: Prompts, rng: torch.Generator, *, empty: float = 0.12) -> Batch:
    """Pictures drawn with replacement, each with a wording drawn for it, or with the empty prompt."""
    picks = torch.randint(len(data.shows), (size,), generator=rng)
    ways = torch.randint(len(WORDINGS), (size,), generator=rng)
    without = torch.rand(size, generator=rng) < empty
    texts = [
        "" if none else prompt(*data.shows[i], WORDINGS[way])
        for i, way, none in zip(picks.tolist(), ways.tolist(), without.tolist(), strict=True)
    ]
    x, noise = data.latents[picks], torch.randn(size, *data.latents.shape[1:], generator=rng)
    # half spread evenly over the levels, half leaning to high noise, as the sampler's shift of 3 does
    t = torch.rand(size, generator=rng)
    t = torch.where(torch.rand(size, generator=rng) < 0.5, t, 3 * t / (1 + 2 * t))
    at = t[:, None, None, None]
    return Batch((1 - at) * x + at * noise, t, *prompts(texts), noise - x)
