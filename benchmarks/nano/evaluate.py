"""Run the comparison: choose each method's strength on tuning pairs, score it on the others, for every seed."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from legomole.core.adapter import Adapter
from legomole.nano.store import Store

from .methods import METHODS, Loras, Method, merged_in
from .scoring import Scorer, Task, task

Set = tuple[tuple[str, ...], int]  # concepts and the seed of their LoRAs

# Never scored. fish + ember of seed 0, like the third pair, house + shadow, shows both at hardly any strength of the
# plain sum: where nothing can be seen, nothing can be chosen.
TUNING: tuple[Set, ...] = (
    (("heart", "wood"), 0), (("heart", "wood"), 1), (("heart", "wood"), 2), (("fish", "ember"), 2),
)  # fmt: skip
SCORED = (("heart", "ember"), ("fish", "wood"), ("heart", "shadow"), ("house", "wood"))
LARGER = {3: ("heart", "fish", "ember"), 4: ("heart", "fish", "ember", "wood")}
LARGER_TUNING: dict[int, Set] = {3: (("heart", "house", "wood"), 0), 4: (("heart", "house", "shadow", "wood"), 0)}
SCALES = (1.0, 1.15, 1.3, 1.6)


@dataclass(frozen=True)
class Row:
    """One method on one set of LoRAs."""

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
    kid: float
    seconds: float


class Bench:
    """Keeps every row in a file, so that a run that was cut off goes on where it was."""

    def __init__(self, store: Store, log: Path, say: Callable[[str], None]) -> None:
        self.scorer, self.log, self.say = Scorer(store), log, say
        self.rows: dict[tuple[Any, ...], Row] = {}
        if log.exists():
            for line in log.read_text().splitlines():
                kept = json.loads(line)
                row = Row(**{**kept, "concepts": tuple(kept["concepts"])})
                self.rows[row.method, row.concepts, row.seed, row.scale] = row
        self._loras: dict[Set, Loras] = {}

    def loras(self, concepts: tuple[str, ...], seed: int) -> Loras:
        """The LoRAs, with the merges and gates made of them."""
        if (concepts, seed) not in self._loras:
            self._loras[concepts, seed] = Loras.of(self.scorer.store, self.scorer.whole, concepts, seed)
        return self._loras[concepts, seed]

    def row(self, name: str, method: Method, concepts: tuple[str, ...], seed: int, scale: float) -> Row:
        """A method's row, measured now or earlier."""
        what = task(concepts, seed=seed)

        def use() -> Any:
            return method.use(self.loras(concepts, seed), scale, what.texts)

        return self._kept(name, concepts, seed, scale, method.rank, what, use, whole=method.whole)

    def measured(self, name: str, concepts: tuple[str, ...], seed: int, what: Task, adapter: Adapter) -> Row:
        """The row of one LoRA at strength 1."""

        def use() -> Any:
            return merged_in(self.scorer.store.transformer, adapter, 1.0)

        return self._kept(name, concepts, seed, 1.0, "-", what, use)

    def _kept(
        self, name: str, concepts: tuple[str, ...], seed: int, scale: float, rank: str, what: Task,
        use: Callable[[], Any], *, whole: bool = False,
    ) -> Row:  # fmt: skip
        key = (name, concepts, seed, scale)
        if key not in self.rows:
            began = time.monotonic()
            with use() as model:
                score = self.scorer.score(model, what, 1000 * seed + 7, whole=whole)
            row = Row(
                name, len(concepts), seed, scale, rank, concepts,
                score.joint, score.subject, score.style, score.base, score.kid, time.monotonic() - began,
            )  # fmt: skip
            self.rows[key] = row
            with self.log.open("a") as file:
                file.write(json.dumps(asdict(row)) + "\n")
            self.say(
                f"{name:18} {'+'.join(concepts):28} seed {seed} x{scale:<4g} joint {row.joint:.2f} "
                f"subject {row.subject:.2f} style {row.style:.2f} base {row.base:.2f} {row.seconds:.1f} s"
            )
        return self.rows[key]


def best(rows: Sequence[Row]) -> float:
    """The strength of the highest joint score; among those as good, the one that keeps most of the rest."""
    found: dict[float, list[Row]] = {}
    for row in rows:
        found.setdefault(row.scale, []).append(row)

    def merit(scale: float) -> tuple[float, float]:
        part = found[scale]
        return round(mean([r.joint for r in part]), 3), mean([(r.subject + r.style + r.base) / 3 for r in part])

    return max(sorted(found), key=merit)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True)
class Plan:
    """What to run: strengths are chosen on `tuning` sets, at them `scored` sets of `seeds` are scored."""

    methods: tuple[str, ...]
    tuning: tuple[Set, ...]
    scored: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[float, ...] = SCALES

    def strengths(self, method: Method) -> tuple[float, ...]:
        """What to try."""
        return (1.0,) if method.fixed else self.scales


def run(bench: Bench, plan: Plan) -> dict[str, float]:
    """All rows of a plan; those of seed 0 at strength 1 too. Returns the strengths that were chosen."""
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
                    bench.row(name, METHODS[name], concepts, seed, scale)
    return chosen
