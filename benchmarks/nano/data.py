"""Latents of rendered pictures with their concepts, and training batches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from legomole.nano.model import Prompts, predict
from legomole.nano.words import WORDINGS, prompt
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .. import processes
from .render import render


class Captioned(Protocol):
    """Latents ``(n, 16, 8, 8)`` with captions."""

    @property
    def latents(self) -> Tensor: ...

    def captions(self, i: int) -> Sequence[str]:
        """Return the captions of an example, one of which is drawn at random."""
        ...


@dataclass(frozen=True)
class Examples:
    """Latents ``(n, 16, 8, 8)`` with the subject and style of each."""

    latents: Tensor
    shows: tuple[tuple[str, str], ...]

    def captions(self, i: int) -> Sequence[str]:
        return [prompt(*self.shows[i], wording) for wording in WORDINGS]

    def __add__(self, other: Examples) -> Examples:
        return Examples(torch.cat([self.latents, other.latents]), self.shows + other.shows)


def examples(
    vae: Any, pairs: Sequence[tuple[str, str]], per_pair: int, seed: int, *, jitter: float, author: bool = False
) -> Examples:
    """Render and encode `per_pair` pictures of each pair of subject and style, see `render`."""
    rng = np.random.default_rng(seed)
    shows = tuple(pair for pair in pairs for _ in range(per_pair))
    return Examples(encoded(vae, [render(*pair, rng, jitter=jitter, author=author) for pair in shows]), shows)


@torch.no_grad()
def encoded(vae: Any, pictures: Sequence[NDArray[np.uint8]]) -> Tensor:
    """Encode pictures ``(64, 64, 3)`` to latents ``(n, 16, 8, 8)``."""
    stacked = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return torch.cat([vae.encoder(part.float() / 127.5 - 1) for part in stacked.split(64)]).contiguous()


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

    def own_share(self) -> Batch:
        """Return this process's part of a batch that several processes share."""
        return Batch(*processes.own_share(list(vars(self).values())))

    def loss(self, transformer: Any) -> Tensor:
        """Return the mean squared error of the transformer's prediction."""
        return F.mse_loss(predict(transformer, self.noised, self.sigma, self.hidden, self.pooled), self.flow)


def draw(data: Captioned, size: int, prompts: Prompts, rng: torch.Generator, *, empty: float = 0.12) -> Batch:
    """Draw pictures with replacement, each with a random wording, or a share `empty` of them with the empty prompt."""
    picks = torch.randint(len(data.latents), (size,), generator=rng)
    wordings = torch.randint(len(WORDINGS), (size,), generator=rng)
    without = torch.rand(size, generator=rng) < empty
    texts = [
        "" if none else data.captions(i)[wording]
        for i, wording, none in zip(picks.tolist(), wordings.tolist(), without.tolist(), strict=True)
    ]
    x, noise = data.latents[picks], torch.randn(size, *data.latents.shape[1:], generator=rng)
    # half of the noise levels are uniform, half shifted to high noise like the sampler's (shift 3)
    t = torch.rand(size, generator=rng)
    t = torch.where(torch.rand(size, generator=rng) < 0.5, t, 3 * t / (1 + 2 * t))
    level = t[:, None, None, None]
    return Batch((1 - level) * x + level * noise, t, *prompts(texts), noise - x)
