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
        _account_module(pool, m, results, moments)
        for m, name in enumerate(pool.names)
        if (moments := statistics.modules.get(name)) is not None
    ]


def _account_module(pool: Pool, m: int, results: Mapping[str, Merged], moments: ModuleStatistics) -> ModuleAccount:
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
    account: defaultdict[str, dict[Kind, float]] = defaultdict(dict)
    for kind, C in _kinds(moments):
        members = torch.tensor([i for i, adapter in enumerate(pool.adapters) if not kind or adapter in kind])
        inside = torch.isin(pool.owner.cpu(), members).to(own)
        wanted = own.clone()
        wanted[: pool.size] *= inside * (JOINT_SCALE if len(kind) > 1 else 1.0)
        G = G_B * space.gram(C.to(A))
        size = float(wanted @ G @ wanted)
        if size <= 0:
            continue
        for name, W in columns.items():
            error = W - wanted if kind else W
            account[name][kind] = max(0.0, float(error @ G @ error)) / size
    return account


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
