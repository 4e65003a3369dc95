"""Prompts for a model with LoRAs, and the scores of its samples."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import torch
from legomole.nano.model import Prompts, short_prompts
from legomole.nano.oracle import judge
from legomole.nano.sampling import sample
from legomole.nano.store import Store
from legomole.nano.words import UNSEEN_WORDINGS, WORDINGS, prompt
from torch import Tensor

from .data import examples
from .render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS

# half of the prompts use wordings that occur neither in training nor in calibration
_WORDINGS = (UNSEEN_WORDINGS[0], WORDINGS[0], UNSEEN_WORDINGS[1], WORDINGS[1])
_RENDERS = 48  # renders per pair, for the distance
# words that the model was not trained on, one each: with their commas all of them fit into 77 tokens
TAGS = ("masterpiece", "detailed", "sharp", "cinematic", "bokeh", "4k", "elegant", "vivid", "volumetric", "hdr",
        "moody", "dramatic", "glossy", "ethereal", "crisp", "textured", "photoreal", "surreal", "majestic", "polished",
        "intricate", "atmospheric", "dynamic", "refined", "balanced", "stunning")  # fmt: skip
_TAGGED = 8  # tags behind the prompts of a tagged task


@dataclass(frozen=True)
class Task:
    """Pictures to sample.

    Args:
        kinds: Kind of each picture: ``joint``, ``subject``, ``style`` or ``base``.
        wanted: Subject and style that each picture should show.
        tags: Number of tags behind each prompt.
    """

    kinds: tuple[str, ...]
    wanted: tuple[tuple[str, str], ...]
    tags: int = 0

    @property
    def texts(self) -> list[str]:
        texts = [prompt(*pair, _WORDINGS[i % len(_WORDINGS)]) for i, pair in enumerate(self.wanted)]
        return [", ".join([text, *TAGS[: self.tags]]) for text in texts]

    def tagged(self) -> Task:
        """The joint pictures, from prompts with eight tags."""
        rows = [i for i, kind in enumerate(self.kinds) if kind == "joint"]
        wanted = tuple(self.wanted[i] for i in rows)
        return replace(self, kinds=("joint",) * len(rows), wanted=wanted, tags=_TAGGED)


def task(concepts: Sequence[str], *, joint: int = 8, alone: int = 4, base: int = 6, seed: int = 0) -> Task:
    """Return pictures for LoRAs: every subject in every style, each concept with base concepts, and base pictures.

    Args:
        concepts: Concepts of the LoRAs.
        joint: Number of pictures of all pairs together (at least 4 of each pair).
        alone: Number of pictures per concept.
        base: Number of pictures without any of the concepts.
        seed: Random seed of the base concepts.
    """
    rng = torch.Generator().manual_seed(seed)
    subjects = [c for c in concepts if c in NEW_SUBJECTS]
    styles = [c for c in concepts if c not in NEW_SUBJECTS]
    pairs = [(s, k) for s in subjects for k in styles]
    pictures: list[tuple[str, tuple[str, str]]] = []
    for pair in pairs:
        pictures += [("joint", pair)] * max(4, joint // len(pairs))
    base_styles = [BASE_STYLES[i] for i in torch.randperm(len(BASE_STYLES), generator=rng).tolist()]
    base_subjects = [BASE_SUBJECTS[i] for i in torch.randperm(len(BASE_SUBJECTS), generator=rng).tolist()]
    for s in subjects:
        pictures += [("subject", (s, base_styles[i])) for i in range(alone)]
    for k in styles:
        pictures += [("style", (base_subjects[i], k)) for i in range(alone)]
    pictures += [("base", (base_subjects[-1 - i], base_styles[-1 - i % len(base_styles)])) for i in range(base)]
    kinds, wanted = zip(*pictures, strict=True)
    return Task(kinds, wanted)


@dataclass
class Score:
    """Scores of a task.

    Args:
        joint, subject, style, base: Share of right pictures of each kind, NaN if there are none.
        kid: Mean distance of the joint pictures to renders, see `distance`.
        pictures: All pictures, ``(n, 3, 64, 64)`` in [-1, 1].
    """

    joint: float
    subject: float
    style: float
    base: float
    kid: float
    pictures: Tensor = field(repr=False)


@dataclass
class Scorer:
    store: Store

    def __post_init__(self) -> None:
        self.short = Prompts(short=True)
        self.whole = Prompts()
        self.any_words = Prompts(any_words=True)
        self._renders = cache(self._render_features)

    def score(self, model: Any, scored: Task, seed: int, *, whole: bool = False) -> Score:
        """Sample the pictures of a task and judge them.

        Args:
            model: Transformer, with or without a mixture attached.
            scored: Pictures to sample, see `task`.
            seed: Random seed of the noise.
            whole: Whether prompts have all 77 tokens, as gates need them. Prompts with tags always have.
        """
        prompts = self.any_words if scored.tags else self.whole if whole else self.short
        with short_prompts(model) if prompts.short else nullcontext():
            latents = sample(model, prompts, scored.texts, seed)
        pictures = self.store.pictures(latents)
        verdict = judge(self.store.oracle, pictures, scored.wanted)

        def share(kind: str) -> float:
            rows = torch.tensor([k == kind for k in scored.kinds])
            return verdict.both[rows].float().mean().item() if rows.any() else float("nan")

        joint = torch.tensor([k == "joint" for k in scored.kinds])
        pairs = list(dict.fromkeys(w for w, k in zip(scored.wanted, scored.kinds, strict=True) if k == "joint"))
        kid = torch.tensor([
            distance(verdict.features[[w == pair for w in scored.wanted]], self._renders(pair)) for pair in pairs
        ]).mean().item() if joint.any() else float("nan")  # fmt: skip
        return Score(share("joint"), share("subject"), share("style"), share("base"), kid, pictures)

    def _render_features(self, pair: tuple[str, str]) -> Tensor:
        rendered = examples(self.store.vae, [pair], _RENDERS, seed=77, jitter=0.5)
        return self.store.oracle.features(self.store.pictures(rendered.latents))


def distance(x: Tensor, y: Tensor) -> float:
    """Return the kernel distance of two sets of features ``(n, F)``: unbiased MMD with ``k(a, b) = (a b / F + 1)^3``.

    Source: KID, arXiv:1801.01401.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within = (kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1))
    among = (kernel(y, y).sum() - kernel(y, y).trace()) / (m * (m - 1))
    return float(within + among - 2 * kernel(x, y).mean())
