"""Ways to combine adapters, by their names in the tables."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from legomole.core.adapter import Adapter
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.ssr import SSR
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.train.second_moments import record_second_moments
from torch import Tensor

from ..common import merged_in, merging
from .adapters import TaskAdapters
from .core_space import TSV, CompressThenMerge, CoreTies, Iso
from .pico import Pico
from .separate import SeparatedLego
from .world import World

Shown = int | Literal["instruction"]  # unlabelled prompts per task
SHOWN = 16
RANK = 8


Use = Callable[[TaskAdapters, float], Any]  # adapters, strength -> context manager that yields the model


@dataclass(frozen=True)
class Method:
    """A way to combine adapters, one row of a table.

    Args:
        use: Combines adapters at a strength.
        rank: Rank of the result, ``"-"`` if it is no adapter.
        data: What the method looks at beside the adapters: ``""``, prompts, labelled examples.
        fixed: Whether the method has no strength to choose.
        whole: Whether it needs to see whole prompts.
    """

    use: Use
    rank: str = str(RANK)
    data: str = ""
    fixed: bool = False
    whole: bool = False


def merge(
    method: Callable[..., Any], rank: int | str = RANK, shown: Shown = 0, fixed: bool = False, **options: Any
) -> Method:
    """Merge the adapters.

    Args:
        method: Makes the merge method from a rank and, with `shown`, from statistics.
        rank: Merged rank. shown: Number of prompts of every task that statistics are measured on; or its
            instruction with unrelated sentences.
        options: Further arguments of the merge.
    """
    compute = merging(method, str(rank), _statistics(shown) if shown else None, **options)
    return Method(
        using(compute), str(rank), f"{shown} prompts" if isinstance(shown, int) and shown else str(shown or ""), fixed
    )


def using(compute: Callable[[Any], Adapter]) -> Use:
    """Add the adapter that `compute` makes of the adapters, once, to the weights."""
    return lambda adapters, strength: merged_in(adapters.world.model, adapters.cached(compute), strength)


_measured: dict[Shown, Callable[[TaskAdapters], Statistics]] = {}


def _statistics(shown: Shown) -> Callable[[TaskAdapters], Statistics]:
    """Measure second moments of the layers' inputs: of every task with its adapter, of neutral texts without any."""

    def compute(adapters: TaskAdapters) -> Statistics:
        world = adapters.world
        names = list(dict.fromkeys(name for adapter in adapters.adapters for name in adapter.modules))
        own: list[dict[str, Tensor]] = []
        for task, adapter in zip(adapters.tasks, adapters.adapters, strict=True):
            examples = world.task(task).train
            prompts = (
                world.instructed(task) if shown == "instruction" else [example.ids for example in examples[:shown]]
            )
            with merged_in(world.model, adapter, 1.0):
                own.append(_moments(world, names, prompts))
        base = _moments(world, names, world.neutral)
        return Statistics(
            {name: ModuleStatistics({i: C[name] for i, C in enumerate(own)}, base=base[name]) for name in names}
        )

    return _measured.setdefault(shown, compute)


def _moments(world: World, names: Sequence[str], prompts: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    modules = {name: world.model.get_submodule(name) for name in names}
    with record_second_moments(modules) as moments, torch.no_grad():
        for prompt in prompts:
            world.model.model(input_ids=torch.tensor([prompt]), use_cache=False)
    return {name: moment.value for name, moment in moments.items()}


@contextmanager
def _base(adapters: TaskAdapters, _: float) -> Generator[Any]:
    yield adapters.world.model


METHODS: dict[str, Method] = {
    "base": Method(_base, "-", fixed=True),
    "sum": merge(lambda _: Concat(), "100%"),
    "svd": merge(SVD),
    "ties": merge(Ties),
    "pico": merge(Pico),
    "lego-paper": merge(lambda k: Lego(k, "paper")),
    "lego": merge(Lego),
    "lego separated": merge(lambda k: SeparatedLego(k, outputs=False)),
    "lego separated, pico": merge(SeparatedLego),
    "ssr": merge(SSR, "100%", SHOWN),
    "lego calibrated": merge(Lego, RANK, SHOWN),
    "calibrated": merge(Calibrated, RANK, SHOWN),
    "lego calibrated, 1 prompt": merge(Lego, RANK, 1),
    "lego calibrated, 4 prompts": merge(Lego, RANK, 4),
    "lego calibrated, 64 prompts": merge(Lego, RANK, 64),
    "lego calibrated, instruction": merge(Lego, RANK, "instruction"),
    "core-ties": merge(CoreTies),
    "tsv": merge(TSV),
    "iso": merge(Iso),
    "ctm": merge(CompressThenMerge),
    "knots": merge(Knots),
    "dare": merge(Dare),
    "average": merge(lambda _: Concat(), "100%", fixed=True, normalize=True),
}  # fmt: skip
