"""Run the comparison: choose each method's strength on tuning examples, then score it on others, for every seed."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...common import ResultLog, Say, mean, merged_in
from .methods import METHODS, TaskAdapters, World

SCALES = (0.4, 0.7, 1.0, 1.4, 2.0)
Folder = Callable[[str, int], Path]  # task, seed -> folder of the adapter


@dataclass(frozen=True)
class Row:
    """Result of one method on one set of adapters.

    Args:
        world: Name of the world. method: Name of the method.
        seed: Seed of the adapters. scale: Strength. rank: Rank of the result, see `Method`.
        tasks: Tasks of the adapters.
        right: Accuracy on each adapter's task. parts: Accuracy on single tokens of each task.
        kept: Accuracy on each task as a share of that of the adapter alone.
        base: Accuracy on the base model's tasks. mixture: Accuracy on two new tasks at a time.
        seconds: Time to combine and score.
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
    """Rows to measure.

    Args:
        methods: Names of the methods. sets: Sets of tasks.
        seeds: Seeds of the adapters. scales: Strengths to try.
    """

    methods: tuple[str, ...]
    sets: tuple[tuple[str, ...], ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    scales: tuple[float, ...] = SCALES


class Bench:
    """Measures rows and logs them with the chosen strengths, so that an interrupted run resumes.

    Args:
        name: Name of the world in the rows.
        world: Returns the world for the adapters of a seed.
        folder: Returns the folder of a task's adapter.
        log: Log file, which several worlds may share.
        say: Called with progress messages.
    """

    def __init__(self, name: str, world: Callable[[int], World], folder: Folder, log: Path, say: Say) -> None:
        self.name, self.world, self.folder, self.log, self.say = name, world, folder, ResultLog(log), say
        self.rows: list[Row] = []
        self.chosen: dict[tuple[str, tuple[tuple[str, ...], ...]], float] = {}
        for result in self.log.read():
            if result["world"] != name:
                continue
            if "chosen" in result:
                self.chosen[result["method"], tuple(map(tuple, result["sets"]))] = result["chosen"]
            else:
                lists = {key: tuple(result[key]) for key in ("tasks", "right", "parts", "kept")}
                self.rows.append(Row(**{**result, **lists}))
        self._adapters: dict[Any, TaskAdapters] = {}

    def adapters(self, tasks: tuple[str, ...], seed: int) -> TaskAdapters:
        """Return the adapters, with a cache of their merges and gates."""
        if (tasks, seed) not in self._adapters:
            folders = tuple(self.folder(task, seed) for task in tasks)
            self._adapters[tasks, seed] = TaskAdapters.load(self.world(seed), tasks, folders, seed)
        return self._adapters[tasks, seed]

    def strength(self, method: str, plan: Plan) -> float:
        """Return the strength with the highest accuracy of the first seed's adapters, among equals the lowest.

        Whole answers and single tokens count equally, because no method may get a whole answer right.
        """
        if METHODS[method].fixed:
            return 1.0
        key = (method, plan.sets)
        if key not in self.chosen:

            def merit(scale: float) -> float:
                accuracies: list[float] = []
                for tasks in plan.sets:
                    adapters = self.adapters(tasks, plan.seeds[0])
                    with METHODS[method].use(adapters, scale) as model:
                        accuracies += [mean(adapters.world.accuracy(model, task, tuning=True)) for task in tasks]
                return round(mean(accuracies), 4)

            self.chosen[key] = max(sorted(plan.scales), key=merit)
            self.log.append({"world": self.name, "method": method, "sets": plan.sets, "chosen": self.chosen[key]})
        return self.chosen[key]

    def alone(self, tasks: tuple[str, ...], seed: int) -> Row:
        """Measure each adapter by itself on its own task; the other scores are means over the adapters."""

        def models() -> Iterator[Any]:
            adapters = self.adapters(tasks, seed)
            for adapter in adapters.adapters:
                with merged_in(adapters.model, adapter, 1.0) as model:
                    yield model

        return self._row("each alone", "-", tasks, seed, 1.0, models)

    def row(self, method: str, tasks: tuple[str, ...], seed: int, scale: float) -> Row:
        """Return the row of a method, measured now or read from the log."""

        def models() -> Iterator[Any]:
            with METHODS[method].use(self.adapters(tasks, seed), scale) as model:
                for _ in tasks:
                    yield model

        return self._row(method, METHODS[method].rank, tasks, seed, scale, models)

    def _row(
        self, method: str, rank: str, tasks: tuple[str, ...], seed: int, scale: float,
        models: Callable[[], Iterator[Any]],
    ) -> Row:  # fmt: skip
        """Score a model for each of the tasks; `models` may yield the same one several times."""
        for row in self.rows:
            if (row.method, row.tasks, row.seed, row.scale) == (method, tasks, seed, scale):
                return row
        alone = self.alone(tasks, seed).right if method != "each alone" else ()
        world = self.adapters(tasks, seed).world
        began = time.monotonic()
        right: list[tuple[float, float]] = []
        base: list[float] = []
        mixture: list[float] = []
        for task, model in zip(tasks, models(), strict=True):
            right.append(world.accuracy(model, task))
            if method == "each alone" or not base:
                base.append(world.base(model))
                mixture.append(world.two_tasks(model, tasks))
        whole, parts = zip(*right, strict=True)
        kept = tuple(a / b if b else 0.0 for a, b in zip(whole, alone or whole, strict=True))
        row = Row(
            self.name, method, seed, scale, rank, tasks, whole, parts, kept, mean(base), mean(mixture),
            time.monotonic() - began,
        )  # fmt: skip
        self.rows.append(row)
        self.log.append(asdict(row))
        self.say(
            f"{method:18} {row.n} seed {seed} x{scale:<4g} new {row.new:.2f} ({mean(row.parts):.2f}) "
            f"worst {row.worst:.2f} base {row.base:.2f} mixture {row.mixture:.2f} {row.seconds:.1f} s"
        )
        return row


def run(bench: Bench, plan: Plan) -> list[Row]:
    """Measure all rows of a plan, each method at the strength chosen for it."""
    rows: list[Row] = []
    for tasks in plan.sets:
        rows += [bench.alone(tasks, seed) for seed in plan.seeds]
    for method in plan.methods:
        scale = bench.strength(method, plan)
        rows += [bench.row(method, tasks, seed, scale) for tasks in plan.sets for seed in plan.seeds]
    return rows


def spread(rows: Sequence[Row], metric: Callable[[Row], float]) -> float | None:
    """Return the standard deviation over the seeds of the mean over the sets, `None` for one seed."""
    seeds = sorted({row.seed for row in rows})
    means = [mean([metric(row) for row in rows if row.seed == seed]) for seed in seeds]
    return statistics.stdev(means) if len(means) > 1 else None
