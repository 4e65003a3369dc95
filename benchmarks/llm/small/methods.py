"""Ways to combine adapters, by their names in the tables."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, Protocol

import torch
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.hosts.transformers.mixing import mixed
from peft import PeftModel
from torch import Tensor

from ...common import Method, merged_in, merging
from ..adapters import TaskAdapters


class World(Protocol):
    """A model with its tasks: scoring, and data for calibrated merges and gates."""

    model: Any

    def accuracy(self, model: Any, task: str, *, tuning: bool = False) -> tuple[float, float]:
        """Return the shares of a task's answers and of their parts that are right; with `tuning`, on other examples."""
        ...

    def base(self, model: Any) -> float:
        """Return the accuracy on the base model's tasks."""
        ...

    def two_tasks(self, model: Any, tasks: Sequence[str]) -> float:
        """Return the accuracy on examples that need two of these tasks at a time, for which nothing was trained."""
        ...

    def moments(self, model: Any, layers: Sequence[str], task: str | None, seed: int) -> Mapping[str, Tensor]:
        """Return second moments of the layers' inputs on a few examples of a task, or of the base tasks (`None`)."""
        ...

    def gates(
        self, mixture: Mixture, tasks: Sequence[str], settings: FitSettings, per_task: int, others: int
    ) -> GateSet:
        """Train gates on `per_task` examples of every task and `others` of the base tasks."""
        ...


Use = Callable[[TaskAdapters, float], Any]  # adapters, strength -> context manager


def _merge(method: Callable[..., Any], rank: str = "1x", *, measured: bool = False, **options: Any) -> Use:
    """Merge the adapters, see `merging`; `measured` methods get statistics."""
    compute = merging(method, rank, statistics if measured else None, **options)

    def use(adapters: TaskAdapters, scale: float) -> Any:
        return merged_in(adapters.model, adapters.cached(compute), scale)

    return use


def statistics(adapters: TaskAdapters) -> Statistics:
    """Measure second moments of the layers' inputs: of every task with its adapter, of the base tasks without any."""
    names = list(adapters.adapters[0].modules)
    of_tasks: list[Mapping[str, Tensor]] = []
    for task, adapter in zip(adapters.tasks, adapters.adapters, strict=True):
        with merged_in(adapters.model, adapter, 1.0):
            of_tasks.append(adapters.world.moments(adapters.model, names, task, adapters.seed))
    base = adapters.world.moments(adapters.model, names, None, adapters.seed)
    return Statistics(
        {name: ModuleStatistics({i: C[name] for i, C in enumerate(of_tasks)}, base=base[name]) for name in names}
    )


def _peft(combination: str, **options: Any) -> Use:
    """Merge with PEFT's `add_weighted_adapter`."""

    @contextmanager
    def use(adapters: TaskAdapters, scale: float) -> Generator[Any]:
        names = [str(i) for i in range(len(adapters.folders))]
        model = PeftModel.from_pretrained(adapters.model, adapters.folders[0], adapter_name=names[0])
        try:
            for name, folder in zip(names[1:], adapters.folders[1:], strict=True):
                model.load_adapter(folder, adapter_name=name)
            torch.manual_seed(adapters.seed)
            model.add_weighted_adapter(names, [scale] * len(names), "all", combination_type=combination, **options)
            model.set_adapter("all")
            yield model.eval()
        finally:
            model.unload()

    return use


@cache
def _training(gates: GateSettings, fit: FitSettings, per_task: int, others: int) -> Callable[[TaskAdapters], GateSet]:
    """Return the same function for the same settings, so that `cached` trains each kind of gates once."""

    def compute(adapters: TaskAdapters) -> GateSet:
        mixture = Mixture(adapters.adapters, GateSet(len(adapters.adapters), gates))
        settings = fit.model_copy(update={"seed": adapters.seed})
        return adapters.world.gates(mixture, adapters.tasks, settings, per_task, others)

    return compute


def _mole(gates: GateSettings, *, balance: float = 0.0, per_task: int = 32, others: int = 32, steps: int = 200) -> Use:
    """Mix the adapters with gates trained on examples of every task and of the base tasks."""
    fit = FitSettings(steps=steps, batch=8, balance=balance)

    def use(adapters: TaskAdapters, scale: float) -> Any:
        trained = adapters.cached(_training(gates, fit, per_task, others))
        return mixed(adapters.model, Mixture(adapters.adapters, trained, scale=scale))

    return _of_model(use)


def _of_model(attached: Use) -> Use:
    """Return a context manager that yields the model itself, for one that yields its attachment."""

    @contextmanager
    def use(adapters: TaskAdapters, scale: float) -> Generator[Any]:
        with attached(adapters, scale):
            yield adapters.model

    return use


def gate(reads: str = "hidden", activation: str = "softmax-null", granularity: str = "network") -> GateSettings:
    return GateSettings.model_validate({"reads": reads, "activation": activation, "granularity": granularity})


METHODS: dict[str, Method] = {
    "base": Method(lambda adapters, _: merged_in(adapters.model, adapters.adapters[0], 0.0), "-", fixed=True),
    "sum": Method(_merge(lambda _: Concat()), "N r"),
    "average": Method(_merge(lambda _: Concat(), normalize=True), "N r", fixed=True),
    "svd": Method(_merge(SVD)),
    "ties": Method(_merge(Ties)),
    "knots": Method(_merge(Knots)),
    "peft ties": Method(_peft("ties", density=0.5)),
    "lego": Method(_merge(Lego)),
    "lego-paper": Method(_merge(lambda k: Lego(k, "paper"))),
    "lego calibrated": Method(_merge(Lego, measured=True)),
    "calibrated": Method(_merge(Calibrated, measured=True)),
    "mole": Method(_mole(gate()), "-", fixed=True),
    "mole sigmoid": Method(_mole(gate(activation="sigmoid")), "-", fixed=True),
    "mole softmax": Method(_mole(gate(activation="softmax")), "-", fixed=True),
    "mole 4 shown": Method(_mole(gate(), per_task=4, others=8), "-", fixed=True),
    "mole no others": Method(_mole(gate(), others=0), "-", fixed=True),
    "mole balance": Method(_mole(gate(), balance=0.5), "-", fixed=True),
    "mole block": Method(_mole(gate(granularity="block")), "-", fixed=True),
    "mole layer": Method(_mole(gate(granularity="layer")), "-", fixed=True),
    "mole matrix": Method(_mole(gate(granularity="matrix")), "-", fixed=True),
    "mole experts": Method(_mole(gate("experts")), "-", fixed=True),
    "mole token": Method(_mole(gate("token")), "-", fixed=True),
    "mole token block": Method(_mole(gate("token", granularity="block")), "-", fixed=True),
    "mole-paper": Method(
        _mole(gate("experts", "softmax", "block"), balance=0.5, others=0), "-", fixed=True),
}  # fmt: skip
