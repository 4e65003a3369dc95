"""Requirements on every row of METHODS."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields, replace
from functools import partial

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.merged import relative_error
from legomole.core.merge.methods import METHODS, MergeMethod
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.linear import Linear
from legomole.core.merge.methods.np_lora import NP
from legomole.core.merge.methods.ssr import SSR
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.pool import overlap
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.recipes.method_settings import build_method, method_settings

from ..pools import random_pool

SMALL = (3, 2)


def instance(name: str) -> MergeMethod:
    row = METHODS[name]
    if row in (Concat, Linear):
        return row()
    if row in (Calibrated, SSR):
        return row(Rank(2), Statistics({"m0": ModuleStatistics({0: torch.eye(12), 1: torch.eye(12)})}))
    return row(Rank(2))


methods = pytest.mark.parametrize("name", METHODS)


@methods
def test_shapes_ranks_and_dtypes(name):
    pool = random_pool(SMALL, weights=[0.7, -1.5])
    merged = instance(name)(pool)
    k = merged.A.shape[1]
    assert (merged.A.shape, merged.B.shape) == ((3, k, 12), (3, 10, k))
    assert (merged.A.dtype, merged.B.dtype) == (torch.float32, torch.float32)
    assert merged.ranks.tolist() == [{"concat": 5, "linear": 3}.get(name, 2)] * 3


@methods
def test_a_pool_of_zeros_gives_zeros(name):
    pool = random_pool(SMALL)
    pool.A.zero_()
    pool.B.zero_()
    merged = instance(name)(pool)
    assert not (merged.B @ merged.A).any()
    assert torch.isfinite(merged.A).all()
    assert torch.isfinite(merged.B).all()


@methods
def test_inputs_are_not_modified(name):
    pool = random_pool(SMALL)
    before = [x.clone() for x in (pool.A, pool.B, pool.c, pool.weights)]
    instance(name)(pool)
    assert all(torch.equal(x, y) for x, y in zip(before, (pool.A, pool.B, pool.c, pool.weights), strict=True))


@methods
def test_settings_are_frozen(name):
    with pytest.raises((FrozenInstanceError, TypeError)):
        instance(name).rank = Rank(3)


@pytest.mark.parametrize(
    "row",
    [
        Lego,
        SVD,
        Ties,
        Dare,
        Knots,
        NP,
        partial(SSR, statistics=Statistics({})),
        partial(Calibrated, statistics=Statistics({})),
    ],
)
def test_a_rank_may_be_given_in_any_form(row):
    for rank, expected in ((16, Rank(16)), ("16", Rank(16)), ("1.5x", Rank(1.5, "x")), ("auto", Rank(95, "%"))):
        method = row(rank)
        assert method.rank == row(rank=rank).rank == expected
        assert method == row(expected) == replace(row(), rank=rank)
    assert row().rank == Rank(1, "x")
    with pytest.raises(MergeError, match="not a rank"):
        row("many")


def test_the_default_rank_is_a_field_default():
    rank = next(field for field in fields(Lego) if field.name == "rank")
    assert rank.default == Rank(1, "x")
    assert method_settings(Lego("2x"))["rank"] == "2x"
    assert build_method("lego", {}) == Lego()


def test_a_calibrated_merge_needs_statistics():
    with pytest.raises(MergeError, match=r"needs statistics[\s\S]*calibrated\.md"):
        Calibrated(4)
    statistics = Statistics({})
    given = [
        Calibrated(4, statistics),
        Calibrated("4", statistics=statistics),
        Calibrated(statistics=statistics, rank=4),
    ]
    assert given[0] == given[1] == given[2]


@methods
def test_every_tensor_is_made_on_the_pools_device(name):
    # the default device is one on which nothing can be computed: a tensor made without naming a device would show
    pool = random_pool(SMALL, batch=2)
    method = instance(name)
    expected = method(pool)
    fresh = random_pool(SMALL, batch=2)
    with torch.device("meta"):
        merged = method(fresh)
        overlap(fresh)
        relative_error(fresh, merged)
    assert torch.equal(merged.A, expected.A)
    assert torch.equal(merged.B, expected.B)
