"""Training pictures: renders with their captions, as latents."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..nano.data import encoded
from .render import Drawings
from .words import WORDINGS, captions, scene_captions

Pair = tuple[str, str]  # subject and style
JITTER = 0.3  # of the pictures that the model is trained on: sizes of 50 to 54 and shifts of up to 1 pixel


@dataclass(frozen=True)
class Pictures:
    """Latents ``(n, 32, 8, 8)`` with the subject and style of each, see `nano.data.Captioned`."""

    latents: Tensor
    shows: tuple[Pair, ...]

    def captions(self, i: int) -> Sequence[str]:
        return captions(*self.shows[i])

    def __add__(self, other: Pictures) -> Pictures:
        return Pictures(torch.cat([self.latents, other.latents]), self.shows + other.shows)


def rendered(drawings: Drawings, pairs: Sequence[Pair], per_pair: int, seed: int, *, jitter: float = 1.0) -> Tensor:
    """Render `per_pair` pictures of each pair one after the other, ``(n, 3, 64, 64)`` uint8."""
    rng = np.random.default_rng(seed)
    pictures = [drawings.render(*pair, rng, jitter=jitter) for pair in pairs for _ in range(per_pair)]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).contiguous()


def pictures(
    vae: Any, drawings: Drawings, pairs: Sequence[Pair], per_pair: int, seed: int, *, jitter: float = 1.0
) -> Pictures:
    """Render and encode `per_pair` pictures of each pair, see `rendered`."""
    raw = rendered(drawings, pairs, per_pair, seed, jitter=jitter).permute(0, 2, 3, 1).numpy()
    return Pictures(encoded(vae, list(raw)), tuple(pair for pair in pairs for _ in range(per_pair)))


@dataclass(frozen=True)
class Scenes:
    """Latents ``(n, 32, 8, 16)`` of scenes: the subject on the left, that on the right (or ``""``), and the style."""

    latents: Tensor
    shows: tuple[tuple[str, str, str], ...]

    def captions(self, i: int) -> Sequence[str]:
        return scene_captions(*self.shows[i])[: len(WORDINGS)]


def scenes(
    vae: Any, drawings: Drawings, subjects: Sequence[str], styles: Sequence[str], count: int, seed: int, *,
    jitter: float = 1.0,
) -> Scenes:  # fmt: skip
    """Render and encode `count` scenes, drawn at random: two different subjects, in every third only one of them."""
    rng = np.random.default_rng(seed)
    shows: list[tuple[str, str, str]] = []
    for i in range(count):
        left, right = map(str, rng.choice(subjects, 2, replace=False))
        if i % 3 == 2:
            left, right = (left, "") if rng.random() < 0.5 else ("", right)
        shows.append((left, right, str(rng.choice(styles))))
    raw = [drawings.scene((left, right), style, rng, jitter=jitter) for left, right, style in shows]
    return Scenes(encoded(vae, raw), tuple(shows))
