"""Predict from statistics what merges keep, before anything is sampled with them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .merged import Merged
from .methods.calibrated import JOINT_SCALE
from .methods.concat import Concat
from .methods.lego import Lego
from .methods.ssr import SSR
from .methods.svd import SVD
from .pool import Pool
from .rank import Rank
from .statistics import ModuleStatistics, Statistics

CHOSEN = "this merge"

Kind = tuple[int, ...]
"""Positions of the adapters that prompts name; ``()``: none."""


@dataclass(frozen=True)
class Prediction:
    """What a merge is predicted to keep. All values are errors relative to the size of what is wanted: 0 is exact.

    Args:
        method: Name of the method; `CHOSEN` for the merge that was made.
        alone: Per adapter, ``|W - delta_i| / |delta_i|`` on prompts that name it alone; ``None`` if not measured.
        joint: ``|W - 1.2 sum delta_i| / |1.2 sum delta_i|`` on prompts that name several, the sum over those.
        base: ``|W| / |sum delta_i|`` on prompts that name none: 1 changes the base model as much as the plain sum.
    """

    method: str
    alone: tuple[float | None, ...]
    joint: float | None
    base: float | None


ModuleAccount = Mapping[str, Mapping[Kind, float]]
"""Method -> kind of prompt -> squared relative error in a module; only kinds in which something is wanted."""


@dataclass(frozen=True)
class Effect:
    """What a merge does in a module on prompts of one kind, relative to the size of what is wanted there.

    Args:
        size: ``|W|^2``, in units of ``|wanted|^2``; for prompts that name no adapter of ``|sum delta_i|^2``.
        along: ``<W, wanted>``, in the same units; 0 for prompts that name none, where no change is wanted.
        goal: ``|wanted|^2`` in these units: 1, or 0 for prompts that name none.
    """

    size: float
    along: float
    goal: float

    def error(self, strength: float = 1.0) -> float:
        """``|strength W - wanted|^2``, in the same units: the squared relative error at a strength of the merge."""
        return max(0.0, strength**2 * self.size - 2 * strength * self.along + self.goal)


ModuleEffects = Mapping[str, Mapping[Kind, Effect]]
"""Name of a merge -> kind of prompt -> its effect in a module."""


def account_batch(pool: Pool, merged: Merged, rank: Rank, statistics: Statistics) -> list[ModuleAccount]:
    """The accounts of a batch's modules, those that have statistics.

    Args:
        pool: The units. merged: The merge that was made.
        rank: Rank of the other methods. statistics: Measured moments; positions refer to the merge's list of adapters.
    """
    if not any(name in statistics.modules for name in pool.names):
        return []
    results = {
        "sum": Concat()(pool),
        "svd": SVD(rank)(pool),
        "lego": Lego(rank)(pool),
        "lego calibrated": Lego(rank, statistics=statistics)(pool),
        "ssr": SSR(rank, statistics)(pool),
        CHOSEN: merged,
    }
    return [
        {name: {kind: effect.error() for kind, effect in row.items()} for name, row in effects.items()}
        for effects in batch_effects(pool, results, statistics).values()
    ]


def batch_effects(pool: Pool, results: Mapping[str, Merged], statistics: Statistics) -> dict[str, ModuleEffects]:
    """The effects of several merges of a batch, by module; only modules that have statistics.

    Args:
        pool: The units. results: Merges of the pool by name.
        statistics: Measured moments; positions refer to the merge's list of adapters.
    """
    return {
        name: _module_effects(pool, m, results, moments)
        for m, name in enumerate(pool.names)
        if (moments := statistics.modules.get(name)) is not None
    }


def _module_effects(pool: Pool, m: int, results: Mapping[str, Merged], moments: ModuleStatistics) -> ModuleEffects:
    A = torch.cat([pool.A[m], *(result.A[m] for result in results.values())]).double()
    B = torch.cat([pool.B[m], *(result.B[m] for result in results.values())], 1).double()
    space, G_B = moments.space(A), B.mT @ B
    own = A.new_zeros(len(A))
    own[: pool.size] = pool.c[m]
    columns: dict[str, Tensor] = {}  # coefficients of W in the stacked units
    start = pool.size
    for name, result in results.items():
        columns[name] = A.new_zeros(len(A))
        columns[name][start : start + result.A.shape[1]] = 1
        start += result.A.shape[1]
    effects: defaultdict[str, dict[Kind, Effect]] = defaultdict(dict)
    for kind, C in _kinds(moments):
        members = torch.tensor([i for i, adapter in enumerate(pool.adapters) if not kind or adapter in kind])
        inside = torch.isin(pool.owner.cpu(), members).to(own)
        wanted = own.clone()
        wanted[: pool.size] *= inside * (JOINT_SCALE if len(kind) > 1 else 1.0)
        G = G_B * space.gram(C.to(A))
        unit = float(wanted @ G @ wanted)
        if unit <= 0:
            continue
        for name, W in columns.items():
            along = float(W @ G @ wanted) / unit if kind else 0.0
            effects[name][kind] = Effect(float(W @ G @ W) / unit, along, 1.0 if kind else 0.0)
    return effects


def batch_inner(pool: Pool, statistics: Statistics) -> dict[str, dict[Kind, Tensor]]:
    """Inner products of the adapters' deltas on measured inputs, weights included.

    Args:
        pool: The units. statistics: Measured moments; positions refer to the merge's list of adapters.

    Returns:
        Module -> kind of prompt -> ``<delta_i, delta_j>_C = tr(delta_i C delta_j^T)``, ``(n, n)`` float64 on the CPU,
        adapters in the order of the pool; only modules that have statistics.
    """
    member = torch.nn.functional.one_hot(pool.owner, len(pool.ranks)) * pool.c[:, :, None]  # (M, P, n)
    tables: dict[str, dict[Kind, Tensor]] = {}
    for m, name in enumerate(pool.names):
        moments = statistics.modules.get(name)
        if moments is not None:
            A = pool.A[m].double()
            space = moments.space(A)
            tables[name] = {
                kind: (member[m].mT @ (pool.G_B[m] * space.gram(C.to(A))) @ member[m]).cpu()
                for kind, C in _kinds(moments)
            }
    return tables


def _kinds(moments: ModuleStatistics) -> Iterable[tuple[Kind, Tensor]]:
    yield from (((i,), C) for i, C in moments.own.items())
    yield from moments.joint.items()
    if moments.base is not None:
        yield (), moments.base


def predict(accounts: Sequence[ModuleAccount], adapters: int) -> tuple[Prediction, ...]:
    """The predictions of a whole merge: root mean squares over modules, in which every module counts alike."""
    squares: defaultdict[tuple[str, Any], list[float]] = defaultdict(list)
    for account in accounts:
        for method, errors in account.items():
            for kind, square in errors.items():
                role: Any = "joint" if len(kind) > 1 else kind[0] if kind else "base"
                squares[method, role].append(square)

    def root(method: str, role: Any) -> float | None:
        values = squares.get((method, role))
        return None if not values else (sum(values) / len(values)) ** 0.5

    methods = dict.fromkeys(method for account in accounts for method in account)
    return tuple(
        Prediction(method, tuple(root(method, i) for i in range(adapters)), root(method, "joint"), root(method, "base"))
        for method in methods
    )
