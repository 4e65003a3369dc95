"""Prompts for a model with a subject and a style LoRA, and the scores of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import torch
from legomole.nano.model import short_prompts
from legomole.nano.oracle import judge
from legomole.nano.sampling import sample
from torch import Tensor

from ..common import bfloat16
from ..nano.scoring import TAGS
from . import render, words
from .data import Pair
from .model import ArtStore
from .text import ArtPrompts
from .vae import CHANNELS

# half of the prompts use wordings that occur neither in training nor in calibration
_WORDINGS = (words.UNSEEN_WORDINGS[0], words.WORDINGS[0], words.UNSEEN_WORDINGS[1], words.WORDINGS[1])
TAGGED = 8
KINDS = ("joint", "subject", "style", "base")


@dataclass(frozen=True)
class Amount:
    """Numbers of pictures of each kind; `variant` of prompts with tags and as many with synonyms."""

    joint: int = 8
    subject: int = 4
    style: int = 4
    base: int = 4
    variant: int = 4


@dataclass(frozen=True)
class Task:
    """Pictures to sample.

    Args:
        kinds: Kind of each picture, one of `KINDS`, or ``tagged`` or ``synonym`` for variants of joint pictures.
        wanted: Subject and style that each picture should show.
    """

    kinds: tuple[str, ...]
    wanted: tuple[Pair, ...]

    @property
    def texts(self) -> list[str]:
        return [self._text(i) for i in range(len(self.kinds))]

    def _text(self, i: int) -> str:
        (subject, style), wording = self.wanted[i], _WORDINGS[i % len(_WORDINGS)]
        if self.kinds[i] == "synonym":
            return words.caption(words.SYNONYMS[subject], style, wording)
        text = words.caption(subject, style, wording)
        return ", ".join([text, *TAGS[:TAGGED]]) if self.kinds[i] == "tagged" else text


def task(pair: Pair, amount: Amount, seed: int = 0) -> Task:
    """Return pictures for a subject LoRA and a style LoRA: both, each with base concepts, and base concepts alone."""
    rng = np.random.default_rng([seed, words.SUBJECTS.index(pair[0]), words.STYLES.index(pair[1])])
    subjects = [str(s) for s in rng.permutation(words.BASE_SUBJECTS)]
    styles = [str(k) for k in rng.permutation(words.BASE_STYLES)]
    base = [(s, styles[i % len(styles)]) for i, s in enumerate(subjects[amount.style :])]
    base = [both for both in base if not render.never_shown(*both)]
    pictures: list[tuple[str, Pair]] = [("joint", pair)] * amount.joint
    pictures += [("subject", (pair[0], styles[i % len(styles)])) for i in range(amount.subject)]
    pictures += [("style", (subjects[i], pair[1])) for i in range(amount.style)]
    pictures += [("base", base[i]) for i in range(amount.base)]
    kinds, wanted = zip(*pictures, strict=True)
    return Task(kinds, wanted)


def variant(kind: str, pair: Pair, count: int) -> Task:
    """Return joint pictures from prompts with tags or with synonyms of the subject."""
    return Task((kind,) * count, (pair,) * count)


@dataclass
class Score:
    """Judged pictures of a task.

    Args:
        kinds: Kind of each picture.
        subject, style: Whether each picture shows the wanted subject and style, ``(n,)`` bool.
        pictures: The pictures, ``(n, 3, 64, 64)`` in [-1, 1].
    """

    kinds: Sequence[str]
    subject: Tensor
    style: Tensor
    pictures: Tensor = field(repr=False)

    def share(self, kind: str, right: Tensor | None = None) -> float:
        """Return the share of pictures of a kind that show what they should, NaN without pictures."""
        rows = torch.tensor([k == kind for k in self.kinds])
        right = self.subject & self.style if right is None else right
        return right[rows].float().mean().item()


@dataclass(frozen=True)
class Scorer:
    """Samples and judges pictures."""

    store: ArtStore

    @cached_property
    def short(self) -> ArtPrompts:
        return ArtPrompts(short=True)

    @cached_property
    def whole(self) -> ArtPrompts:
        return ArtPrompts()

    def score(self, model: Any, scored: Task, seed: int, *, whole: bool = False) -> Score:
        """Sample the pictures of a task and judge them; `whole` prompts have all 77 tokens, as gates need them."""
        whole = whole or "tagged" in scored.kinds
        prompts = self.whole if whole else self.short
        with bfloat16(), nullcontext() if whole else short_prompts(model, prompts.tokens):
            latents = sample(model, prompts, scored.texts, seed, channels=CHANNELS)
        pictures = self.store.pictures(latents.float())
        verdict = judge(self.store.oracle, pictures, scored.wanted)
        return Score(scored.kinds, verdict.subject, verdict.style, pictures)
