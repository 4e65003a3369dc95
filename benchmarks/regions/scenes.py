"""Scenes: one or two subjects on a canvas of two squares, their captions and their latents."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from legomole.nano.model import SIDE, Prompts
from legomole.nano.words import UNSEEN_WORDINGS, WORDINGS, prompt, with_articles
from numpy.typing import NDArray
from torch import Tensor

from ..nano.data import encoded
from ..nano.render import BASE_STYLES, BASE_SUBJECTS, SIZE, mask, paint

LEFT, RIGHT = "left", "right"
SIDES = (LEFT, RIGHT)
TOKENS = 18  # tokens of a short prompt; the wordings have at most 17, start and end tokens included
WIDTH = 2 * SIDE  # width of the latents
# six wordings as in `WORDINGS`, then two that no training uses; {l}, {r}: subject on the left and right, {k}: style
_TWO = ("a {l} on the left, a {r} on the right, {k} style", "{l} left, {r} right, {k}",
        "{k} style, one {l} on the left, one {r} on the right", "a {k} picture of a {l} left and a {r} on the right",
        "the {l} left and the {r} right, drawn in {k} style", "a {l} on the left and a {r} right with {k} look",
        "please paint one {l} on the left, one {r} on the right, {k}",
        "a {k} image of {l} left and {r} right")  # fmt: skip
# {s}: subject, {p}: its side
_ONE = ("a {s} on the {p}, {k} style", "{s} {p}, {k}", "{k} style, one {s} on the {p}",
        "a {k} picture of a {s} {p}", "the {s} {p}, drawn in {k} style", "a {s} on the {p} with {k} look",
        "please paint one {s} on the {p}, {k}", "a {k} image of {s} {p}")  # fmt: skip


@dataclass(frozen=True)
class Scene:
    """What a picture shows.

    Args:
        style: Style of the whole canvas.
        left, right: Subjects, one on each half; empty for none.
        anywhere: Instead of these, one subject at a random place and in a random size.
        silent: Whether the captions leave out the place of a single subject.
    """

    style: str
    left: str = ""
    right: str = ""
    anywhere: str = ""
    silent: bool = False

    def captions(self) -> list[str]:
        """Return a caption in each of six wordings, then in two that no training uses."""
        if self.left and self.right:
            return [with_articles(w.format(l=self.left, r=self.right, k=self.style)) for w in _TWO]
        subject, side = self.left or self.right or self.anywhere, LEFT if self.left else RIGHT
        if self.silent or self.anywhere:
            return [prompt(subject, self.style, w) for w in (*WORDINGS, *UNSEEN_WORDINGS)]
        return [with_articles(w.format(s=subject, p=side, k=self.style)) for w in _ONE]

    def half(self, side: str) -> Scene:
        """Return the scene without the other half's subject."""
        return replace(self, left="" if side == RIGHT else self.left, right="" if side == LEFT else self.right)

    def render(self, rng: np.random.Generator) -> NDArray[np.uint8]:
        """Render a picture ``(64, 128, 3)`` with random pose, texture and colour."""
        if self.anywhere:
            scale, pose = rng.uniform(0.7, 1), int(rng.integers(2**32))
            x, y = rng.uniform(0.4, 1.6), 0.5 + rng.uniform(-0.4, 0.4) * (1 - scale)
            shapes = [  # one shape, cut where the halves meet
                mask(self.anywhere, np.random.default_rng(pose), 0.5, scale=scale, centre=(x - side, y))
                for side in (0, 1)
            ]
        else:
            shapes = [side_shape(subject, rng) for subject in (self.left, self.right)]
        return np.concatenate([paint(shape, self.style, rng) for shape in shapes], 1)


def side_shape(subject: str, rng: np.random.Generator) -> NDArray[np.float64]:
    """Return the shape of a subject on one half, see `mask`; nothing for an empty name."""
    return mask(subject, rng, 0.8, scale=0.95) if subject else np.zeros((3 * SIZE, 3 * SIZE))


@dataclass(frozen=True)
class Scenes:
    """Latents ``(n, 16, 8, 16)`` of pictures with their scenes."""

    latents: Tensor
    shows: tuple[Scene, ...]

    def captions(self, i: int) -> Sequence[str]:
        return self.shows[i].captions()


def rendered(vae: Any, shows: Sequence[Scene], seed: int) -> Scenes:
    """Render and encode one picture of each scene."""
    rng = np.random.default_rng(seed)
    return Scenes(encoded(vae, [scene.render(rng) for scene in shows]), tuple(shows))


def base_scenes(times: int) -> list[Scene]:
    """Return the base model's scenes of base subjects in base styles.

    Per style every ordered pair of subjects `times` times, and six times as often each subject alone: on the left, on
    the right, on both again with captions that leave out the side, and twice anywhere.
    """
    scenes: list[Scene] = []
    for style in BASE_STYLES:
        scenes += [Scene(style, a, b) for a, b in itertools.product(BASE_SUBJECTS, BASE_SUBJECTS)]
        for subject in BASE_SUBJECTS:
            for silent in (False, True):
                scenes += [Scene(style, left=subject, silent=silent), Scene(style, right=subject, silent=silent)]
                scenes += [Scene(style, anywhere=subject)]
    return scenes * times


def encoder(*, short: bool = False) -> Prompts:
    """Return a prompt encoder that accepts the words of the captions."""
    return Prompts(short=short, any_words=True, tokens=TOKENS)
