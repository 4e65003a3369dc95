"""Run the comparison: choose each method's strength on dev prompts of one seed, then score it on test prompts."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..common import ResultLog, Say, mean, merged_in
from .methods import METHODS, Method, TaskAdapters
from .peers import PEERS
from .routing import ROUTED
from .world import World

STRENGTHS = (0.2, 0.3, 0.45, 0.65, 1.0, 1.4, 2.0)
CHOSEN_ON = 1  # seed of the adapters on which strengths are chosen
ROWS = METHODS | ROUTED | PEERS  # in the order of the tables
Folder = Callable[[str, int], Path]  # task, seed -> folder of the adapter


@dataclass
class Bench:
    """Measures rows and logs everything, so that an interrupted run resumes.

    Args:
        world: Model and tasks. folder: Returns the folder of a task's adapter.
        log: Log of all results. say: Called with progress messages. methods: The methods by name.
    """

    world: World
    folder: Folder
    log: ResultLog
    say: Say
    methods: dict[str, Method] = field(default_factory=lambda: ROWS)
    _logged: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict[Any, Any])
    _sets: dict[Any, TaskAdapters] = field(default_factory=dict[Any, Any])

    def __post_init__(self) -> None:
        for result in self.log.read():
            self._logged[_key(**result["key"])] = result

    def _cached(self, compute: Callable[[], dict[str, Any]], **key: Any) -> dict[str, Any]:
        """Return a logged result, or compute and log it."""
        if _key(**key) not in self._logged:
            began = time.monotonic()
            result = {"key": key, **compute(), "seconds": round(time.monotonic() - began, 1)}
            self._logged[_key(**key)] = result
            self.log.append(result)
            self.say(" ".join(f"{value}" for value in key.values()) + " " + _short(result))
        return self._logged[_key(**key)]

    def adapters(self, tasks: Sequence[str], seed: int) -> TaskAdapters:
        """Return the adapters, with a cache of their merges and gates; only the last set is kept."""
        key = (tuple(tasks), seed)
        if key not in self._sets:
            self._sets.clear()
            folders = [self.folder(task, seed) for task in tasks]
            self._sets[key] = TaskAdapters.load(self.world, tuple(tasks), folders, seed)
        return self._sets[key]

    def base(self, tasks: Sequence[str]) -> dict[str, Any]:
        """Scores of the base model."""

        def compute() -> dict[str, Any]:
            model = self.world.model
            return {
                "accuracies": dict(zip(tasks, self.world.accuracies(model, tasks), strict=True)),
                "held_out": self.world.held_out(model),
                "perplexity": self.world.perplexity(model),
            }

        return self._cached(compute, what="base", tasks=",".join(tasks))

    def gain(self, task: str) -> dict[str, Any]:
        """Accuracy of the base model and of a task's adapter on all dev prompts."""

        def compute() -> dict[str, Any]:
            world = self.world
            base = world.accuracies(world.model, [task], dev=world.size.dev)[0]
            with merged_in(world.model, self.adapters((task,), CHOSEN_ON).adapters[0], 1.0) as model:
                return {"base": base, "alone": world.accuracies(model, [task], dev=world.size.dev)[0]}

        return self._cached(compute, what="gain", task=task)

    def alone(self, task: str, seed: int) -> dict[str, Any]:
        """Accuracy of a task's adapter on its task."""

        def compute() -> dict[str, Any]:
            with merged_in(self.world.model, self.adapters((task,), seed).adapters[0], 1.0) as model:
                return {"accuracy": self.world.accuracies(model, [task])[0]}

        return self._cached(compute, what="alone", task=task, seed=seed)

    def elsewhere(self, task: str, seed: int) -> dict[str, Any]:
        """Scores of a task's adapter on what it was not trained on."""

        def compute() -> dict[str, Any]:
            with merged_in(self.world.model, self.adapters((task,), seed).adapters[0], 1.0) as model:
                return {"held_out": self.world.held_out(model), "perplexity": self.world.perplexity(model)}

        return self._cached(compute, what="elsewhere", task=task, seed=seed)

    def dev(self, method: str, tasks: Sequence[str], seed: int, strength: float) -> float:
        """Mean accuracy on dev prompts."""

        def compute() -> dict[str, Any]:
            chosen = self.methods[method]
            with chosen.use(self.adapters(tasks, seed), strength) as model:
                scores = self.world.accuracies(model, tasks, dev=self.world.size.swept, whole=chosen.whole)
            return {"accuracies": scores, "mean": mean(scores)}

        key = {"what": "dev", "method": method, "tasks": ",".join(tasks), "seed": seed, "strength": strength}
        return self._cached(compute, **key)["mean"]

    def strength(self, method: str, tasks: Sequence[str]) -> float:
        """Climb from the middle to the best on dev prompts, with one seed's adapters; among equals the one tried first.

        Accuracy rises and falls once with the strength, so that the neighbours of the best are enough.
        """
        if self.methods[method].fixed:
            return 1.0
        best = len(STRENGTHS) // 2
        for step in (-1, 1):
            start = best
            while 0 <= best + step < len(STRENGTHS):
                here, there = (self.dev(method, tasks, CHOSEN_ON, STRENGTHS[i]) for i in (best, best + step))
                if there <= here:
                    break
                best += step
            if best != start:
                break
        return STRENGTHS[best]

    def test(self, method: str, tasks: Sequence[str], seed: int) -> None:
        """Score a method at the strength chosen for it."""
        strength, chosen = self.strength(method, tasks), self.methods[method]

        def compute() -> dict[str, Any]:
            with chosen.use(self.adapters(tasks, seed), strength) as model:
                return {
                    "accuracies": self.world.accuracies(model, tasks, whole=chosen.whole),
                    "held_out": self.world.held_out(model, whole=chosen.whole),
                    "perplexity": self.world.perplexity(model),
                }

        key = {"what": "test", "method": method, "tasks": ",".join(tasks), "seed": seed, "strength": strength}
        self._cached(compute, **key)


def _key(**key: Any) -> tuple[Any, ...]:
    """The same for a key as given and as read from the log."""
    return tuple(sorted((name, str(value)) for name, value in key.items()))


def _short(result: dict[str, Any]) -> str:
    numbers = {name: value for name, value in result.items() if isinstance(value, float)}
    if isinstance(result.get("accuracies"), list):
        numbers["accuracy"] = mean(result["accuracies"])
    return " ".join(f"{name} {value:.3f}" for name, value in numbers.items())
