"""What is asked of a model with LoRAs on it, and how well it does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from legomole.nano.model import Prompts
from legomole.nano.oracle import judge
from legomole.nano.sampling import sample
from legomole.nano.store import Store
from legomole.nano.words import UNSEEN_WORDINGS, WORDINGS, prompt
from torch import Tensor

from .data import examples
from .render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS

# half of the prompts are worded as in no training and no calibration
_WORDINGS = (UNSEEN_WORDINGS[0], WORDINGS[0], UNSEEN_WORDINGS[1], WORDINGS[1])
_RENDERS = 48  # per pair, for the distance


@dataclass(frozen=True)
class Task:
    """Pictures to paint: each with its kind (``joint``, ``subject``, ``style``, ``base``) and what it should show."""

    kinds: tuple[str, ...]
    wanted: tuple[tuple[str, str], ...]

    @property
    def texts(self) -> list[str]:
        return [prompt(*pair, _WORDINGS[i % len(_WORDINGS)]) for i, pair in enumerate(self.wanted)]


def task(concepts: Sequence[str], *, joint: int = 8, alone: int = 4, base: int = 6, seed: int = 0) -> Task:
    """For LoRAs of these concepts: every subject in every style, each alone among base concepts, and base pictures.

    Args:
        concepts: Of the LoRAs. joint: Pictures of all pairs together (at least 4 of each). alone: Of each concept.
        base: Of none. seed: Which base concepts go with them.
    """
    rng = torch.Generator().manual_seed(seed)
    subjects = [c for c in concepts if c in NEW_SUBJECTS]
    styles = [c for c in concepts if c not in NEW_SUBJECTS]
    pairs = [(s, k) for s in subjects for k in styles]
    found: list[tuple[str, tuple[str, str]]] = []
    for pair in pairs:
        found += [("joint", pair)] * max(4, joint // len(pairs))
    some = [BASE_STYLES[i] for i in torch.randperm(len(BASE_STYLES), generator=rng).tolist()]
    others = [BASE_SUBJECTS[i] for i in torch.randperm(len(BASE_SUBJECTS), generator=rng).tolist()]
    for s in subjects:
        found += [("subject", (s, some[i])) for i in range(alone)]
    for k in styles:
        found += [("style", (others[i], k)) for i in range(alone)]
    found += [("base", (others[-1 - i], some[-1 - i % len(some)])) for i in range(base)]
    kinds, wanted = zip(*found, strict=True)
    return Task(kinds, wanted)


@dataclass
class Score:
    """Shares of right pictures by kind, the distance of the joint ones to renders, and those pictures."""

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
        self._renders = cache(self._render_features)

    def score(self, model: Any, what: Task, seed: int, *, whole: bool = False) -> Score:
        """Paint `what` and judge it.

        Args:
            model: The transformer, inside `short_prompts` unless `whole`.
            what: See `task`. seed: Of the noise. whole: Give the model all 77 tokens, as gates need them.
        """
        latents = sample(model, self.whole if whole else self.short, what.texts, seed)
        pictures = self.store.pictures(latents)
        verdict = judge(self.store.oracle, pictures, what.wanted)

        def share(kind: str) -> float:
            rows = torch.tensor([k == kind for k in what.kinds])
            return verdict.both[rows].float().mean().item() if rows.any() else float("nan")

        joint = torch.tensor([k == "joint" for k in what.kinds])
        pairs = list(dict.fromkeys(w for w, k in zip(what.wanted, what.kinds, strict=True) if k == "joint"))
        kid = torch.tensor([
            distance(verdict.features[[w == pair for w in what.wanted]], self._renders(pair)) for pair in pairs
        ]).mean().item() if joint.any() else float("nan")  # fmt: skip
        return Score(share("joint"), share("subject"), share("style"), share("base"), kid, pictures)

    def _render_features(self, pair: tuple[str, str]) -> Tensor:
        rendered = examples(self.store.vae, [pair], _RENDERS, seed=77, jitter=0.5)
        return self.store.oracle.features(self.store.pictures(rendered.latents))


def distance(x: Tensor, y: Tensor) -> float:
    """Kernel distance of two sets of features ``(n, F)``: the unbiased MMD with ``k(a, b) = (a b / F + 1)^3``.

    Source: KID, arXiv:1801.01401.
    """
    x, y = x.double(), y.double()

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.mT / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    within = (kernel(x, x).sum() - kernel(x, x).trace()) / (n * (n - 1))
    among = (kernel(y, y).sum() - kernel(y, y).trace()) / (m * (m - 1))
    return float(within + among - 2 * kernel(x, y).mean())
