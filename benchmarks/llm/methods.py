"""The ways to combine adapters that are compared, each under its name in the table."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.hosts.transformers.mixing import experts, mixed
from peft import PeftModel
from torch import Tensor

from ..common import merged_in


class World(Protocol):
    """A model and its tasks: how they are scored, and what calibrated merges and gates may learn from."""

    model: Any

    def right(self, model: Any, task: str, *, tuning: bool = False) -> tuple[float, float]:
        """Share of a task's examples that a model gets right, and of their parts; for choosing strengths, of others."""
        ...

    def base(self, model: Any) -> float:
        """The same of what the base model could do before."""
        ...

    def mixture(self, model: Any, tasks: Sequence[str]) -> float:
        """The same of examples that need two of these tasks at a time; nothing was trained on any."""
        ...

    def moments(self, model: Any, layers: Sequence[str], task: str | None, seed: int) -> Mapping[str, Tensor]:
        """Second moments of these layers' inputs on a few examples of a task, or of none (`None`)."""
        ...

    def gates(self, mixture: Mixture, tasks: Sequence[str], settings: FitSettings, shown: int, others: int) -> GateSet:
        """Trained gates, from `shown` examples of every task and `others` of none."""
        ...


@dataclass
class Adapters:
    """The adapters of some tasks and one seed, and what the methods make of them."""

    world: World
    tasks: tuple[str, ...]
    folders: tuple[Path, ...]
    seed: int
    adapters: tuple[Adapter, ...] = ()
    _made: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def __post_init__(self) -> None:
        self.adapters = tuple(experts(self.model, [load(folder) for folder in self.folders]))

    @property
    def model(self) -> Any:
        return self.world.model

    def once(self, make: Callable[[Adapters], Any]) -> Any:
        """What `make` gives for these adapters, made but once."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]


Use = Callable[[Adapters, float], Any]  # a context manager that gives the model


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        use: Makes the model for adapters at a strength.
        rank: Of the result, at N adapters of rank r; ``"-"`` where there is no result.
        fixed: Has no strength to choose.
    """

    use: Use
    rank: str = "r"
    fixed: bool = False


def _merge(method: Callable[..., Any], rank: str = "1x", *, measured: bool = False, **options: Any) -> Use:
    """A merge: `method` is called with the rank, and with statistics where it wants them; options are `merge`'s."""

    def make(given: Adapters) -> Adapter:
        known = {"statistics": given.once(statistics)} if measured else {}
        return merge(given.adapters, method(Rank.parse(rank), **known), dtype=torch.float32, **options).adapter

    def use(given: Adapters, scale: float) -> Any:
        return merged_in(given.model, given.once(make), scale)

    return use


def statistics(given: Adapters) -> Statistics:
    """Second moments of the layers' inputs: of every task with its own adapter on, of the base tasks with none."""
    names = list(given.adapters[0].modules)
    own: list[Mapping[str, Tensor]] = []
    for task, adapter in zip(given.tasks, given.adapters, strict=True):
        with merged_in(given.model, adapter, 1.0):
            own.append(given.world.moments(given.model, names, task, given.seed))
    base = given.world.moments(given.model, names, None, given.seed)
    return Statistics(
        {name: ModuleStatistics({i: C[name] for i, C in enumerate(own)}, base=base[name]) for name in names}
    )


def _peft(combination: str, **options: Any) -> Use:
    """PEFT's own merge."""

    @contextmanager
    def use(given: Adapters, scale: float) -> Generator[Any]:
        names = [str(i) for i in range(len(given.folders))]
        model = PeftModel.from_pretrained(given.model, given.folders[0], adapter_name=names[0])
        try:
            for name, folder in zip(names[1:], given.folders[1:], strict=True):
                model.load_adapter(folder, adapter_name=name)
            torch.manual_seed(given.seed)
            model.add_weighted_adapter(names, [scale] * len(names), "all", combination_type=combination, **options)
            model.set_adapter("all")
            yield model.eval()
        finally:
            model.unload()

    return use


@cache
def _training(gates: GateSettings, fit: FitSettings, shown: int, others: int) -> Callable[[Adapters], GateSet]:
    """One function for the same gates, so that `Adapters.once` trains them once."""

    def make(given: Adapters) -> GateSet:
        mixture = Mixture(given.adapters, GateSet(len(given.adapters), gates))
        settings = fit.model_copy(update={"seed": given.seed})
        return given.world.gates(mixture, given.tasks, settings, shown, others)

    return make


def _mole(gates: GateSettings, *, balance: float = 0.0, shown: int = 32, others: int = 32, steps: int = 200) -> Use:
    """Gates as the product trains them, from examples of every adapter and of none."""
    fit = FitSettings(steps=steps, batch=8, balance=balance)

    def use(given: Adapters, scale: float) -> Any:
        trained = given.once(_training(gates, fit, shown, others))
        return mixed(given.model, Mixture(given.adapters, trained, scale=scale))

    return _of_model(use)


def _of_model(attached: Use) -> Use:
    """The model itself, while something is attached to it."""

    @contextmanager
    def use(given: Adapters, scale: float) -> Generator[Any]:
        with attached(given, scale):
            yield given.model

    return use


def gate(reads: str = "hidden", activation: str = "softmax-null", granularity: str = "network") -> GateSettings:
    return GateSettings.model_validate({"reads": reads, "activation": activation, "granularity": granularity})


METHODS: dict[str, Method] = {
    "base": Method(lambda given, _: merged_in(given.model, given.adapters[0], 0.0), "-", fixed=True),
    "sum": Method(_merge(lambda _: Concat()), "N r"),
    "average": Method(_merge(lambda _: Concat(), normalize=True), "N r", fixed=True),
    "svd": Method(_merge(SVD)),
    "ties": Method(_merge(Ties)),
    "dare": Method(_merge(Dare)),
    "knots": Method(_merge(Knots)),
    "peft linear": Method(_peft("linear")),
    "peft ties": Method(_peft("ties", density=0.5)),
    "peft dare_ties": Method(_peft("dare_ties", density=0.5)),
    "lego": Method(_merge(Lego)),
    "lego 2x": Method(_merge(Lego, "2x"), "2 r"),
    "lego-paper": Method(_merge(lambda k: Lego(k, "paper"))),
    "lego calibrated": Method(_merge(Lego, measured=True)),
    "calibrated": Method(_merge(Calibrated, measured=True)),
    "calibrated 2x": Method(_merge(Calibrated, "2x", measured=True), "2 r"),
    "mole": Method(_mole(gate()), "-", fixed=True),
    "mole long": Method(_mole(gate(), shown=64, others=128, steps=400), "-", fixed=True),
    "mole sigmoid": Method(_mole(gate(activation="sigmoid")), "-", fixed=True),
    "mole softmax": Method(_mole(gate(activation="softmax")), "-", fixed=True),
    "mole 4 shown": Method(_mole(gate(), shown=4, others=8), "-", fixed=True),
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
