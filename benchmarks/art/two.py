"""Two subject LoRAs in one picture, one on the left and one on the right, with and without regions."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..common import ResultLog, Say, bfloat16
from ..nano.methods import LoraSet
from ..processes import apart
from ..regions.methods import METHODS as REGIONS
from ..regions.methods import Request, Use
from ..regions.scenes import LEFT
from ..regions.scoring import judged, sampled
from . import words
from .methods import METHODS, load_set
from .model import ArtStore
from .text import ArtPrompts
from .words import LORA_SUBJECTS

Subjects = tuple[str, str]
PAIRS: tuple[Subjects, ...] = tuple((a, LORA_SUBJECTS[(i + 7) % 24]) for i, a in enumerate(LORA_SUBJECTS))
"""Subjects of the LoRAs on the left and on the right: every LoRA once on each side."""
_COUNT = 8  # pictures per row, each in another style
STRENGTH = 1.0


@dataclass(frozen=True)
class Scene:
    """Subjects on the left and on the right, ``""`` for none, in one style."""

    style: str
    left: str
    right: str

    def captions(self) -> list[str]:
        """Return six captions, then two in wordings that no training uses."""
        return words.scene_captions(self.left, self.right, self.style)

    def half(self, side: str) -> Scene:
        return replace(self, right="") if side == LEFT else replace(self, left="")


def _as_one(name: str) -> Use:
    return lambda loras, request: METHODS[name].use(loras, request.strength, request.texts)


TWO_METHODS: dict[str, Use] = {
    **{name: _as_one(name) for name in ("base", "sum", "ties", "lego")},
    "router": REGIONS["gates"],
    **{name: REGIONS[name] for name in ("hooks", "masks", "automatic")},
}


@dataclass(frozen=True)
class TwoRow:
    """Result of one method on one pair of subject LoRAs.

    Args:
        pair: Subjects on the left and on the right.
        two: Share of pictures in which each half shows its own subject.
        halves: Share of halves that do.
        other: Share of halves that show the other half's subject.
        seconds: Time to combine, sample and judge.
    """

    method: str
    pair: Subjects
    seed: int
    n: int
    strength: float
    two: float
    halves: float
    other: float
    seconds: float

    @property
    def concepts(self) -> Subjects:
        return self.pair


def base_pairs(count: int) -> list[Subjects]:
    """Return pairs of base subjects, for what the base model does without LoRAs."""
    chosen = np.random.default_rng(5).choice(words.BASE_SUBJECTS, (count, 2), replace=False)
    return [(str(a), str(b)) for a, b in chosen]


class TwoBench:
    """Measures rows of two subjects and logs them."""

    def __init__(self, store: ArtStore, log: Path, say: Say) -> None:
        self.store, self.log, self.say = store, ResultLog(log), say
        self.short, self.whole = ArtPrompts(short=True), ArtPrompts()
        self.read()

    def read(self) -> None:
        """Read the rows that are in the log."""
        self.rows = {(row.method, row.pair): row for row in self.log.rows(TwoRow, "pair")}

    def pair(self, pair: Subjects) -> None:
        """Measure all methods on a pair of LoRAs."""
        missing = [name for name in TWO_METHODS if (name, pair) not in self.rows]
        if not missing:
            return
        loras = load_set(self.store, self.whole, pair, wide=True)
        for name in missing:
            self._row(name, pair, TWO_METHODS[name], loras)

    def base(self, pair: Subjects) -> None:
        """Measure the base model on two of its own subjects."""
        if ("base subjects", pair) not in self.rows:
            loras = load_set(self.store, self.whole, PAIRS[0], wide=True)
            self._row("base subjects", pair, TWO_METHODS["base"], loras)

    def _row(self, name: str, pair: Subjects, use: Use, loras: LoraSet) -> None:
        began = time.monotonic()
        shown = judged(self.store, self._pictures(use, pair, loras)).subjects
        own = shown == torch.tensor([words.SUBJECTS.index(subject) for subject in pair])
        other = shown == torch.tensor([words.SUBJECTS.index(subject) for subject in pair[::-1]])
        row = TwoRow(
            name, pair, 0, 2, STRENGTH, own.all(1).float().mean().item(), own.float().mean().item(),
            other.float().mean().item(), time.monotonic() - began,
        )  # fmt: skip
        self.rows[name, pair] = row
        self.log.append(asdict(row))
        self.say(
            f"{name:14} {'+'.join(pair):22} two {row.two:.2f} halves {row.halves:.2f} other {row.other:.2f} "
            f"{row.seconds:.0f} s"
        )

    def _pictures(self, use: Use, pair: Subjects, loras: LoraSet) -> Tensor:
        """Sample pictures ``(8, 3, 64, 128)`` of a pair in varying base styles."""
        request = Request([Scene(style, *pair) for style in words.BASE_STYLES[:_COUNT]], self.short, STRENGTH)
        with use(loras, request) as transformer, bfloat16():
            return sampled(self.store, transformer, request, 1000 + words.SUBJECTS.index(pair[0]))


def run(bench: TwoBench, pairs: Sequence[Subjects] = PAIRS, processes: int = 1) -> None:
    """Measure all rows."""
    work = partial(_measure, bench.store.folder, bench.log.path, bench.say)
    apart(processes, work, [*base_pairs(len(pairs)), *pairs])
    bench.read()


def _measure(folder: Path, log: Path, say: Say, pair: Subjects) -> None:
    bench = _bench(folder, log, say)
    (bench.pair if pair in PAIRS else bench.base)(pair)


@cache
def _bench(folder: Path, log: Path, say: Say) -> TwoBench:
    return TwoBench(ArtStore(folder), log, say)
