"""Run the comparison: every method on every pair of LoRAs; an interrupted run resumes."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

from ..common import ResultLog, Say, mean
from ..nano.methods import LoraSet, merged_in
from ..processes import apart
from .data import Pair
from .methods import METHODS, load_set
from .model import ArtStore
from .scoring import Amount, Score, Scorer, task, variant
from .words import LORA_SUBJECTS, NEW_STYLES

PAIRS: tuple[Pair, ...] = tuple(
    (LORA_SUBJECTS[i % 24], NEW_STYLES[(3 * i + i // 24) % len(NEW_STYLES)]) for i in range(40)
)
"""Pairs of the tables: every style five times, every subject once or twice."""
TUNING: tuple[Pair, ...] = (
    ("unicorn", "pixel"), ("owl", "comic"), ("crab", "neon"), ("cactus", "sticker"), ("pineapple", "woodcut"),
    ("doughnut", "negative"),
)  # fmt: skip
"""Pairs on which strengths are chosen; none of them is in `PAIRS`."""
METHOD_NAMES = ("base", "sum", "svd", "ties", "lego-paper", "lego", "one-step", "ssr", "np", "k-lora", "router")
TRAINED = ("lego calibrated", "mole", "mole-paper")
"""Methods that measure full statistics, or train, on samples of the model."""


@dataclass(frozen=True)
class Row:
    """Result of one method on one pair of LoRAs.

    Args:
        pair: Subject and style of the LoRAs.
        seed: Seed of the noise.
        n: Number of LoRAs.
        strength: Strength of the merge or mixture.
        joint, subject, style, base: Share of right pictures of each kind, see `task`.
        joint_subject, joint_style: Share of joint pictures that show the subject, or the style, whatever else.
        tagged, synonym: As joint, from prompts with tags, and from prompts with other words for the subject.
        seconds: Time to combine, sample and judge.
    """

    method: str
    pair: Pair
    seed: int
    n: int
    strength: float
    joint: float
    subject: float
    style: float
    base: float
    joint_subject: float
    joint_style: float
    tagged: float
    synonym: float
    seconds: float

    @property
    def concepts(self) -> Pair:
        return self.pair


class Bench:
    """Measures rows and logs them.

    Args:
        store: Model and LoRAs.
        log: File of the finished rows.
        amount: Numbers of pictures per row.
        say: Called with progress messages.
    """

    def __init__(self, store: ArtStore, log: Path, amount: Amount, say: Say) -> None:
        self.scorer, self.log, self.amount, self.say = Scorer(store), ResultLog(log), amount, say
        self.read()
        self._loras: tuple[Pair, LoraSet] | None = None

    def read(self) -> None:
        """Read the rows that are in the log."""
        self.rows = {(row.method, row.pair, row.strength): row for row in self.log.rows(Row, "pair")}

    def loras(self, pair: Pair) -> LoraSet:
        """Return the LoRAs of a pair with a cache of their merges and gates, which holds one pair at a time."""
        if self._loras is None or self._loras[0] != pair:
            self._loras = pair, load_set(self.scorer.store, self.scorer.whole, pair)
        return self._loras[1]

    def row(self, name: str, pair: Pair, strength: float, *, variants: bool = True) -> Row:
        """Return a row, measured now or read from the log; `variants` are prompts with tags and with synonyms."""
        key = (name, pair, strength)
        if key not in self.rows:
            began = time.monotonic()
            score = self.score(name, pair, strength, task(pair, self.amount))
            others = {"tagged": math.nan, "synonym": math.nan}
            for kind in others if variants else ():
                scored = variant(kind, pair, self.amount.variant)
                others[kind] = self.score(name, pair, strength, scored).share(kind)
            row = Row(
                name, pair, 0, 2, strength, *(score.share(kind) for kind in ("joint", "subject", "style", "base")),
                score.share("joint", score.subject), score.share("joint", score.style), **others,
                seconds=time.monotonic() - began,
            )  # fmt: skip
            self.rows[key] = row
            self.log.append(asdict(row))
            self.say(
                f"{name:16} {'+'.join(pair):22} x{strength:<4g} joint {row.joint:.2f} ({row.joint_subject:.2f} "
                f"{row.joint_style:.2f}) subject {row.subject:.2f} style {row.style:.2f} base {row.base:.2f} "
                f"tagged {row.tagged:.2f} synonym {row.synonym:.2f} {row.seconds:.0f} s"
            )
        return self.rows[key]

    def score(self, name: str, pair: Pair, strength: float, scored: Any) -> Score:
        """Sample and judge a task with a method; ``subject alone`` and ``style alone`` are single LoRAs."""
        loras, seed = self.loras(pair), 7 + PAIRS.index(pair) if pair in PAIRS else 7
        if name in ALONE:
            adapter = loras.adapters[ALONE.index(name)]
            with merged_in(loras.transformer, adapter, strength) as model:
                return self.scorer.score(model, scored, seed)
        method = METHODS[name]
        with method.use(loras, strength, scored.texts) as model:
            return self.scorer.score(model, scored, seed, whole=method.whole)


ALONE = ("subject alone", "style alone")
SWEEP = (0.6, 0.8, 1.0, 1.3)
_FIXED = ("base", *ALONE)  # rows without a strength to choose


@dataclass(frozen=True)
class Wish:
    """A row to measure, see `Bench.row`."""

    name: str
    strength: float
    variants: bool = True


def measure(bench: Bench, wishes: Mapping[Pair, Sequence[Wish]], processes: int = 1) -> None:
    """Measure rows, one pair per process at a time."""
    missing = [
        (pair, [w for w in part if (w.name, pair, w.strength) not in bench.rows]) for pair, part in wishes.items()
    ]
    work = partial(_measure, bench.scorer.store.folder, bench.log.path, bench.amount, bench.say)
    apart(processes, work, [job for job in missing if job[1]])
    bench.read()


def _measure(folder: Path, log: Path, amount: Amount, say: Say, job: tuple[Pair, Sequence[Wish]]) -> None:
    bench = _bench(folder, log, amount, say)
    pair, wishes = job
    for wish in wishes:
        bench.row(wish.name, pair, wish.strength, variants=wish.variants)


@cache
def _bench(folder: Path, log: Path, amount: Amount, say: Say) -> Bench:
    return Bench(ArtStore(folder), log, amount, say)


def tune(bench: Bench, names: Sequence[str], processes: int = 1) -> dict[str, float]:
    """Choose each method's strength on the pairs of `TUNING`."""
    names = [name for name in names if name not in _FIXED]
    tried = [Wish(name, strength, variants=False) for name in names for strength in SWEEP]
    measure(bench, dict.fromkeys(TUNING, tried), processes)
    rows = [bench.rows[wish.name, pair, wish.strength] for pair in TUNING for wish in tried]
    return {**dict.fromkeys(_FIXED, 1.0), **{name: best([r for r in rows if r.method == name]) for name in names}}


def best(rows: Sequence[Row]) -> float:
    """Return the strength with the highest joint score; among equals, the one that preserves most of the rest."""

    def merit(strength: float) -> tuple[float, float]:
        part = [row for row in rows if row.strength == strength]
        return round(mean([r.joint for r in part]), 3), mean([r.subject + r.style + r.base for r in part])

    return max(sorted({row.strength for row in rows}), key=merit)


def run(bench: Bench, pairs: Sequence[Pair] = PAIRS, processes: int = 1) -> dict[str, float]:
    """Measure the rows of the tables, at strength 1 and at the chosen strengths, which it returns."""
    names = (*METHOD_NAMES, *TRAINED)
    chosen = tune(bench, names, processes)
    wishes = [Wish(name, chosen[name]) for name in (*ALONE, *names)]
    wishes += [Wish(name, 1.0, variants=False) for name in names if chosen[name] != 1.0]
    measure(bench, dict.fromkeys(pairs, wishes), processes)
    return chosen
