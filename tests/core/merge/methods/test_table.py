"""Requirements on every row of METHODS."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch
from legomole.core.merge.merged import relative_error
from legomole.core.merge.methods import METHODS, MergeMethod
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.linear import Linear
from legomole.core.merge.pool import overlap
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics

from ..pools import random_pool

SMALL = (3, 2)


def instance(name: str) -> MergeMethod:
    row = METHODS[name]
    if row in (Concat, Linear):
        return row()
    if row is Calibrated:
        return Calibrated(Rank(2), Statistics({"m0": ModuleStatistics({0: torch.eye(12), 1: torch.eye(12)})}))
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
