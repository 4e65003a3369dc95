"""Run the comparison: choose each method's strength on tuning examples, score it on others, for every seed."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common import merged_in
from .methods import METHODS, Adapters, World

SCALES = (0.4, 0.7, 1.0, 1.4, 2.0)
Folder = Callable[[str, int], Path]  # where a task's adapter of a seed is


@dataclass(frozen=True)
class Row:
    """One method on one set of adapters.

    Args:
        world: Which model. tasks: Of the adapters.
        right: Accuracy on each adapter's own task. parts: The same of single tokens. kept: Accuracy as a share of that
            adapter's alone.
        base: On what the base model could do before. mixture: On two new tasks at a time.
    """

    world: str
    method: str
    seed: int
    scale: float
    rank: str
    tasks: tuple[str, ...]
    right: tuple[float, ...]
    parts: tuple[float, ...]
    kept: tuple[float, ...]
    base: float
    mixture: float
    seconds: float

    @property
    def n(self) -> int:
        return len(self.tasks)

    @property
    def new(self) -> float:
        return mean(self.right)

    @property
    def worst(self) -> float:
        return min(self.right)


@dataclass(frozen=True)
class Plan:
    """What to run: methods on sets of tasks, for the seeds of the adapters."""

    methods: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[float, ...] = SCALES


class Bench:
    """Keeps every row and chosen strength in a file, so that a run that was cut off goes on where it was.

    Args:
        name: Of the world, in the rows.
        world: Of the adapters of a seed. folder: Finds them. log: The file. say: Told of rows.
    """

    def __init__(
        self, name: str, world: Callable[[int], World], folder: Folder, log: Path, say: Callable[[str], None]
    ) -> None:
        self.name, self.world, self.folder, self.log, self.say = name, world, folder, log, say
        self.rows: list[Row] = []
        self.chosen: dict[tuple[str, tuple[tuple[str, ...], ...]], float] = {}
        for line in log.read_text().splitlines() if log.exists() else ():
            kept = json.loads(line)
            if "chosen" in kept:
                if kept["world"] == name:
                    self.chosen[kept["method"], tuple(map(tuple, kept["sets"]))] = kept["chosen"]
            elif kept["world"] == name:
                lists = {key: tuple(kept[key]) for key in ("tasks", "right", "parts", "kept")}
                self.rows.append(Row(**{**kept, **lists}))
        self._given: dict[Any, Adapters] = {}

    def given(self, tasks: tuple[str, ...], seed: int) -> Adapters:
        """The adapters, with the merges and gates made of them."""
        if (tasks, seed) not in self._given:
            folders = tuple(self.folder(task, seed) for task in tasks)
            self._given[tasks, seed] = Adapters(self.world(seed), tasks, folders, seed)
        return self._given[tasks, seed]

    def strength(self, method: str, plan: Plan) -> float:
        """The one with the most right on new tasks, on the first seed's adapters; the lowest if several.

        Whole answers and their parts count alike: where no answer is right there would be nothing to choose by.
        """
        if METHODS[method].fixed:
            return 1.0
        key = (method, plan.sets)
        if key not in self.chosen:

            def merit(scale: float) -> float:
                found: list[float] = []
                for tasks in plan.sets:
                    given = self.given(tasks, plan.seeds[0])
                    with METHODS[method].use(given, scale) as model:
                        found += [mean(given.world.right(model, task, tuning=True)) for task in tasks]
                return round(mean(found), 4)

            self.chosen[key] = max(sorted(plan.scales), key=merit)
            self._note({"world": self.name, "method": method, "sets": plan.sets, "chosen": self.chosen[key]})
        return self.chosen[key]

    def alone(self, tasks: tuple[str, ...], seed: int) -> Row:
        """Each adapter by itself on its own task; the rest in the mean over the adapters."""

        def models() -> Iterator[Any]:
            given = self.given(tasks, seed)
            for adapter in given.adapters:
                with merged_in(given.model, adapter, 1.0) as model:
                    yield model

        return self._row("each alone", "-", tasks, seed, 1.0, models)

    def row(self, method: str, tasks: tuple[str, ...], seed: int, scale: float) -> Row:
        """A method's row, measured now or earlier."""

        def models() -> Iterator[Any]:
            with METHODS[method].use(self.given(tasks, seed), scale) as model:
                for _ in tasks:
                    yield model

        return self._row(method, METHODS[method].rank, tasks, seed, scale, models)

    def _row(
        self, method: str, rank: str, tasks: tuple[str, ...], seed: int, scale: float,
        models: Callable[[], Iterator[Any]],
    ) -> Row:  # fmt: skip
        """Of a model for each of the tasks in turn, mostly the same one."""
        for row in self.rows:
            if (row.method, row.tasks, row.seed, row.scale) == (method, tasks, seed, scale):
                return row
        alone = self.alone(tasks, seed).right if method != "each alone" else ()
        world = self.given(tasks, seed).world
        began = time.monotonic()
        right: list[tuple[float, float]] = []
        base: list[float] = []
        mixture: list[float] = []
        for task, model in zip(tasks, models(), strict=True):
            right.append(world.right(model, task))
            if method == "each alone" or not base:
                base.append(world.base(model))
                mixture.append(world.mixture(model, tasks))
        whole, parts = zip(*right, strict=True)
        kept = tuple(a / b if b else 0.0 for a, b in zip(whole, alone or whole, strict=True))
        row = Row(
            self.name, method, seed, scale, rank, tasks, whole, parts, kept, mean(base), mean(mixture),
            time.monotonic() - began,
        )  # fmt: skip
        self.rows.append(row)
        self._note(asdict(row))
        self.say(
            f"{method:18} {row.n} seed {seed} x{scale:<4g} new {row.new:.2f} ({mean(row.parts):.2f}) "
            f"worst {row.worst:.2f} base {row.base:.2f} mixture {row.mixture:.2f} {row.seconds:.1f} s"
        )
        return row

    def _note(self, value: dict[str, Any]) -> None:
        with self.log.open("a") as file:
            file.write(json.dumps(value) + "\n")


def run(bench: Bench, plan: Plan) -> list[Row]:
    """All rows of a plan, each method at the strength chosen for it."""
    rows: list[Row] = []
    for tasks in plan.sets:
        rows += [bench.alone(tasks, seed) for seed in plan.seeds]
    for method in plan.methods:
        scale = bench.strength(method, plan)
        rows += [bench.row(method, tasks, seed, scale) for tasks in plan.sets for seed in plan.seeds]
    return rows


def mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def spread(rows: Sequence[Row], metric: Callable[[Row], float]) -> float | None:
    """Standard deviation over the seeds of the mean over the sets; `None` for one seed."""
    seeds = sorted({row.seed for row in rows})
    means = [mean([metric(row) for row in rows if row.seed == seed]) for seed in seeds]
    return statistics.stdev(means) if len(means) > 1 else None
