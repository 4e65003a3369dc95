"""Latents of rendered pictures with their concepts, and training batches."""

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
    """Latents ``(n, 16, 8, 8)`` with the subject and style of each."""

    latents: Tensor
    shows: tuple[tuple[str, str], ...]

    def __add__(self, other: Examples) -> Examples:
        return Examples(torch.cat([self.latents, other.latents]), self.shows + other.shows)


@torch.no_grad()
def examples(
    vae: Any, pairs: Sequence[tuple[str, str]], per_pair: int, seed: int, *, jitter: float, author: bool = False
) -> Examples:
    """Render and encode `per_pair` pictures of each pair of subject and style, see `render`."""
    rng = np.random.default_rng(seed)
    shows = tuple(pair for pair in pairs for _ in range(per_pair))
    pictures = torch.from_numpy(np.stack([render(*pair, rng, jitter=jitter, author=author) for pair in shows]))
    pictures = pictures.permute(0, 3, 1, 2)
    parts = [vae.encoder(part.float() / 127.5 - 1) for part in pictures.split(64)]
    return Examples(torch.cat(parts).contiguous(), shows)


@dataclass(frozen=True)
class Batch:
    """A training batch of ``n`` examples.

    Args:
        noised: Noised latents, ``(n, 16, 8, 8)``.
        sigma: Noise levels in 0 .. 1, ``(n,)``.
        hidden, pooled: Encoded prompts.
        flow: Target of the prediction, noise - latents.
    """

    noised: Tensor
    sigma: Tensor
    hidden: Tensor
    pooled: Tensor
    flow: Tensor

    def to(self, device: str) -> Batch:
        return Batch(*(tensor.to(device) for tensor in vars(self).values()))

    def loss(self, transformer: Any) -> Tensor:
        """Return the mean squared error of the transformer's prediction."""
        return F.mse_loss(predict(transformer, self.noised, self.sigma, self.hidden, self.pooled), self.flow)


def draw(data: Examples, size: int, prompts: Prompts, rng: torch.Generator, *, empty: float = 0.12) -> Batch:
    """Draw pictures with replacement, each with a random wording, or a share `empty` of them with the empty prompt."""
    picks = torch.randint(len(data.shows), (size,), generator=rng)
    wordings = torch.randint(len(WORDINGS), (size,), generator=rng)
    without = torch.rand(size, generator=rng) < empty
    texts = [
        "" if none else prompt(*data.shows[i], WORDINGS[wording])
        for i, wording, none in zip(picks.tolist(), wordings.tolist(), without.tolist(), strict=True)
    ]
    x, noise = data.latents[picks], torch.randn(size, *data.latents.shape[1:], generator=rng)
    # half of the noise levels are uniform, half shifted to high noise like the sampler's (shift 3)
    t = torch.rand(size, generator=rng)
    t = torch.where(torch.rand(size, generator=rng) < 0.5, t, 3 * t / (1 + 2 * t))
    level = t[:, None, None, None]
    return Batch((1 - level) * x + level * noise, t, *prompts(texts), noise - x)
