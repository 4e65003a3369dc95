"""The small causal language model as a world: exactly scored tasks, and gates trained by `train_gates`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import permutations
from typing import Any

import torch
from legomole.core.mole.gates import GateSet
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.core.train.second_moments import record_second_moments
from legomole.hosts.transformers.training import train_gates
from torch import Tensor

from .tasks import BASE, Batch, Task, accuracy, draw, examples, scores

_TUNING, _SCORING, _TRAINING = 9_000, 10_000, 11_000  # seeds of the examples
_BASE: list[Task] = [(name,) for name in BASE]


class Language:
    """Implements `methods.World`.

    Args:
        model: Model trained on the base tasks.
        scored: Scored examples per task.
        tuning: Examples per task for the choice of strengths.
    """

    def __init__(self, model: Any, scored: int = 100, tuning: int = 50) -> None:
        self.model, self.scored, self.tuning = model, scored, tuning

    def accuracy(self, model: Any, task: str, *, tuning: bool = False) -> tuple[float, float]:
        size, seed = (self.tuning, _TUNING) if tuning else (self.scored, _SCORING)
        return scores(model, draw([(task,)], size, seed))

    def base(self, model: Any) -> float:
        return accuracy(model, draw(_BASE, self.scored, _SCORING))

    def two_tasks(self, model: Any, tasks: Sequence[str]) -> float:
        return accuracy(model, draw(list(permutations(tasks, 2)), self.scored, _SCORING))

    def moments(self, model: Any, layers: Sequence[str], task: str | None, seed: int) -> Mapping[str, Tensor]:
        """Measure on 96 examples of a task or 160 of the base tasks, in batches of equal length to avoid padding."""
        rows = examples(_BASE if task is None else [(task,)], 160 if task is None else 96, _TRAINING + seed)
        lengths: dict[int, list[Any]] = {}
        for prompt, answer in rows:
            lengths.setdefault(len(prompt) + len(answer), []).append((prompt, answer))
        with record_second_moments({name: model.get_submodule(name) for name in layers}) as moments, torch.no_grad():
            for part in lengths.values():
                model(input_ids=Batch.of(part).ids)
        return {name: moment.value for name, moment in moments.items()}

    def gates(
        self, mixture: Mixture, tasks: Sequence[str], settings: FitSettings, per_task: int, others: int
    ) -> GateSet:
        of_tasks = [examples([(task,)], per_task, _TRAINING + settings.seed) for task in tasks]
        of_base = examples(_BASE, others, _TRAINING + settings.seed) if others else []
        return train_gates(self.model, mixture, of_tasks, settings=settings, others=of_base).gates.gates
