"""Run the comparison: choose each method's strength on tuning sets, then score it on other sets, for every seed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from legomole.core.adapter import Adapter
from legomole.nano.store import Store

from ..common import ResultLog, Say, mean
from .methods import METHODS, LoraSet, Method, merged_in
from .scoring import Scorer, Task, task

LoraKey = tuple[tuple[str, ...], int]  # concepts and the seed of their LoRAs

# never scored; without fish + ember of seed 0 and without house + shadow, whose sum shows both concepts at hardly any
# strength, so that they give no basis for a choice
TUNING: tuple[LoraKey, ...] = (
    (("heart", "wood"), 0), (("heart", "wood"), 1), (("heart", "wood"), 2), (("fish", "ember"), 2),
)  # fmt: skip
SCORED = (("heart", "ember"), ("fish", "wood"), ("heart", "shadow"), ("house", "wood"))
WIDE = (*SCORED, ("fish", "shadow"), ("house", "ember"), ("house", "shadow"), ("bolt", "ember"))
LARGER = {3: ("heart", "fish", "ember"), 4: ("heart", "fish", "ember", "wood")}
LARGER_TUNING: dict[int, LoraKey] = {3: (("heart", "house", "wood"), 0), 4: (("heart", "house", "shadow", "wood"), 0)}
SCALES = (1.0, 1.15, 1.3, 1.6)


@dataclass(frozen=True)
class Row:
    """Result of one method on one set of LoRAs.

    Args:
        n: Number of LoRAs. seed: Seed of the LoRAs and of the noise.
        scale: Strength. rank: Rank of the result, see `Method`.
        concepts: Concepts of the LoRAs.
        joint, subject, style, base, kid: Scores, see `Score`.
        tagged: Share of right joint pictures from prompts with tags, see `Task.tagged`; NaN if not measured.
        seconds: Time to combine, sample and judge.
    """

    method: str
    n: int
    seed: int
    scale: float
    rank: str
    concepts: tuple[str, ...]
    joint: float
    subject: float
    style: float
    base: float
    tagged: float
    kid: float
    seconds: float


class Bench:
    """Measures rows and logs them, so that an interrupted run resumes."""

    def __init__(self, store: Store, log: Path, say: Say) -> None:
        self.scorer, self.log, self.say = Scorer(store), ResultLog(log), say
        self.rows = {(row.method, row.concepts, row.seed, row.scale): row for row in self.log.rows(Row, "concepts")}
        self._loras: dict[LoraKey, LoraSet] = {}

    def loras(self, concepts: tuple[str, ...], seed: int) -> LoraSet:
        """Return the LoRAs, with a cache of their merges and gates."""
        if (concepts, seed) not in self._loras:
            self._loras[concepts, seed] = LoraSet.load(self.scorer.store, self.scorer.whole, concepts, seed)
        return self._loras[concepts, seed]

    def row(
        self, name: str, method: Method, concepts: tuple[str, ...], seed: int, scale: float, *, tagged: bool = False
    ) -> Row:
        """Return the row of a method, measured now or read from the log; `tagged` measures prompts with tags too."""
        scored = task(concepts, seed=seed)

        def use(texts: Sequence[str]) -> Any:
            return method.use(self.loras(concepts, seed), scale, texts)

        return self._row(name, concepts, seed, scale, method.rank, scored, use, whole=method.whole, tagged=tagged)

    def row_of_one(self, name: str, concepts: tuple[str, ...], seed: int, scored: Task, adapter: Adapter) -> Row:
        """Return the row of a single LoRA at strength 1."""

        def use(_: Sequence[str]) -> Any:
            return merged_in(self.scorer.store.transformer, adapter, 1.0)

        return self._row(name, concepts, seed, 1.0, "-", scored, use, tagged=True)

    def _row(
        self, name: str, concepts: tuple[str, ...], seed: int, scale: float, rank: str, scored: Task,
        use: Callable[[Sequence[str]], Any], *, whole: bool = False, tagged: bool = False,
    ) -> Row:  # fmt: skip
        key = (name, concepts, seed, scale)
        if key not in self.rows:
            began = time.monotonic()
            with use(scored.texts) as model:
                score = self.scorer.score(model, scored, 1000 * seed + 7, whole=whole)
            with_tags = self.score_with_tags(scored, seed, use) if tagged else math.nan
            row = Row(
                name, len(concepts), seed, scale, rank, concepts, score.joint, score.subject, score.style, score.base,
                with_tags, score.kid, time.monotonic() - began,
            )  # fmt: skip
            self.rows[key] = row
            self.log.append(asdict(row))
            self.say(
                f"{name:18} {'+'.join(concepts):28} seed {seed} x{scale:<4g} joint {row.joint:.2f} "
                f"subject {row.subject:.2f} style {row.style:.2f} base {row.base:.2f} tagged {row.tagged:.2f} "
                f"{row.seconds:.1f} s"
            )
        return self.rows[key]

    def score_with_tags(self, scored: Task, seed: int, use: Callable[[Sequence[str]], Any]) -> float:
        """Return the share of right joint pictures from prompts with tags."""
        tagged = scored.tagged()
        with use(tagged.texts) as model:
            return self.scorer.score(model, tagged, 1000 * seed + 7).joint


def best(rows: Sequence[Row]) -> float:
    """Return the strength with the highest joint score; among equals, the one that preserves most of the rest."""
    by_scale: dict[float, list[Row]] = {}
    for row in rows:
        by_scale.setdefault(row.scale, []).append(row)

    def merit(scale: float) -> tuple[float, float]:
        part = by_scale[scale]
        return round(mean([r.joint for r in part]), 3), mean([(r.subject + r.style + r.base) / 3 for r in part])

    return max(sorted(by_scale), key=merit)


@dataclass(frozen=True)
class Plan:
    """Rows to measure.

    Args:
        methods: Names of the methods. tuning: Sets on which each method's strength is chosen.
        scored: Concepts of the sets that are scored at that strength, for all `seeds`.
        scales: Strengths to try.
        tagged: Whether prompts with tags are scored too.
    """

    methods: tuple[str, ...]
    tuning: tuple[LoraKey, ...]
    scored: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[float, ...] = SCALES
    tagged: bool = True

    def strengths(self, method: Method) -> tuple[float, ...]:
        """Return the strengths to try."""
        return (1.0,) if method.fixed else self.scales


def run(bench: Bench, plan: Plan) -> dict[str, float]:
    """Measure all rows of a plan, those of seed 0 also at strength 1; return the chosen strength of each method."""
    names = plan.methods
    tried: dict[str, list[Row]] = {name: [] for name in names}
    for concepts, seed in plan.tuning:
        for name in names:
            for scale in plan.strengths(METHODS[name]):
                tried[name].append(bench.row(name, METHODS[name], concepts, seed, scale))
    chosen = {name: best(rows) for name, rows in tried.items()}
    for concepts in plan.scored:
        for seed in plan.seeds:
            for name in names:
                for scale in {chosen[name], 1.0} if seed == 0 else {chosen[name]}:
                    bench.row(name, METHODS[name], concepts, seed, scale, tagged=plan.tagged)
    return chosen
