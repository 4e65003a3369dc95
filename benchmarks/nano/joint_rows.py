"""Joint scores of merges of a pair of LoRAs, in a log from which an interrupted run resumes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from legomole.core.adapter import Adapter

from ..common import ResultLog
from .evaluate import Bench, LoraKey
from .methods import merged_in
from .scoring import Task, task

Key = tuple[tuple[str, ...], int, str]  # concepts, seed, name of the merge


def joint_pictures(concepts: tuple[str, ...], seed: int) -> Task:
    """The joint pictures of a task, see `task`."""
    scored = task(concepts, seed=seed)
    rows = [i for i, kind in enumerate(scored.kinds) if kind == "joint"]
    return replace(scored, kinds=("joint",) * len(rows), wanted=tuple(scored.wanted[i] for i in rows))


class Rows:
    """Joint scores of merges, measured now or read from the log."""

    def __init__(self, bench: Bench, log: Path) -> None:
        self.bench, self.log = bench, ResultLog(log)
        self.scores: dict[Key, float] = {
            (tuple(row["concepts"]), row["seed"], row["name"]): row["joint"] for row in self.log.read()
        }

    def score(self, key: LoraKey, name: str, adapter: Callable[[], Adapter], strength: float) -> float:
        """Return the joint score of a merge; `adapter` makes it, if it has to be measured."""
        concepts, seed = key
        if (concepts, seed, name) not in self.scores:
            began = time.monotonic()
            with merged_in(self.bench.scorer.store.transformer, adapter(), strength) as model:
                score = self.bench.scorer.score(model, joint_pictures(concepts, seed), 1000 * seed + 7).joint
            self.scores[concepts, seed, name] = score
            self.log.append({"concepts": concepts, "seed": seed, "name": name, "joint": score})
            self.bench.say(f"{'+'.join(concepts)} {seed} {name}: {score:.3f}, {time.monotonic() - began:.1f} s")
        return self.scores[concepts, seed, name]
