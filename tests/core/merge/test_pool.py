"""Pool: every Gram-space quantity against the dense matrices it stands for."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.merge.factors import InMemoryFactors
from legomole.core.merge.merged import LinearCombination, Merged, relative_error
from legomole.core.merge.pool import overlap

from .pools import close, deltas, make_pool, product, random_pool, total

seeds = st.integers(0, 10_000)
ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)


@given(seeds, ranks)
@settings(max_examples=25, deadline=None)
def test_overlap_equals_dense_norms_and_cosines(seed, ranks):
    pool = random_pool(ranks, weights=[0.5, -2.0, 1.0][: len(ranks)], scales=[2.0, 0.25, 1.0][: len(ranks)], seed=seed)
    norms, cosine = overlap(pool)
    D = deltas(pool).flatten(2)
    assert torch.allclose(norms, D.norm(dim=2), rtol=1e-9)
    unit = D / D.norm(dim=2, keepdim=True)
    assert torch.allclose(cosine, unit @ unit.mT, atol=1e-9)


def test_overlap_of_a_zero_delta_is_zero_not_nan():
    pool = random_pool((2, 2))
    pool.B[0, :, :2] = 0
    norms, cosine = overlap(pool)
    assert norms[0, 0] == 0
    assert cosine[0].tolist() == [[0.0, 0.0], [0.0, pytest.approx(1.0)]]


@given(seeds, ranks)
@settings(max_examples=25, deadline=None)
def test_squared_norm_and_relative_error_equal_the_dense_ones(seed, ranks):
    pool = random_pool(ranks, weights=[0.5, -2.0, 1.0][: len(ranks)], seed=seed)
    other = random_pool((3,), seed=seed + 1)
    merged = Merged(other.A, other.B, torch.full((3,), 3))
    D = total(pool)
    assert torch.allclose(pool.inner.sum((1, 2)), D.square().sum((1, 2)), rtol=1e-9)
    expected = (product(merged) - D).norm(dim=(1, 2)) / D.norm(dim=(1, 2))
    assert torch.allclose(relative_error(pool, merged), expected, rtol=1e-7)


def test_relative_error_where_the_sum_is_zero_is_the_merged_norm():
    pool = make_pool([torch.ones(1, 1, 2)] * 2, [torch.ones(1, 2, 1)] * 2, weights=[1.0, -1.0])
    # merged delta [[3, 0], [0, 0]]
    merged = Merged(torch.tensor([[[3.0, 0.0]]]), torch.tensor([[[1.0], [0.0]]]), torch.tensor([1]))
    assert relative_error(pool, merged).tolist() == [3.0]


def test_svd_decomposes_the_sum():
    pool = random_pool((3, 2), weights=[1.0, -0.5], scales=[2.0, 0.5])
    assert torch.allclose(pool.svd.S, torch.linalg.svdvals(total(pool))[:, :5], rtol=1e-9)
    assert close(product(LinearCombination(pool.svd.R_A, pool.svd.R_B, torch.full((3,), 5)).apply(pool)), total(pool))


def test_owner_scale_and_split():
    pool = random_pool((3, 2), weights=[-2.0, 0.5], scales=[0.5, 3.0])
    assert pool.owner.tolist() == [0, 0, 0, 1, 1]
    assert pool.scale.tolist() == [[0.5] * 3 + [3.0] * 2] * 3
    assert [part.shape[1] for part in pool.split(pool.A, 1)] == [3, 2]
    assert (pool.size, pool.batch) == (5, 3)


def test_max_rank_is_bounded_by_the_matrix():
    assert random_pool((3, 2)).max_rank == 5
    assert random_pool((3, 2), d_in=4).max_rank == 4
    assert random_pool((3, 2), d_out=2).max_rank == 2


def test_gram_matrices_are_double_so_that_nearly_parallel_units_stay_apart():
    # two units that differ by 2^-12: |a_1 - a_2|^2 = 2^-24 is below float32's resolution next to |a|^2 = 1
    A = torch.tensor([[[1.0, 0.0], [1.0, 2.0**-12]]])
    pool = random_pool((2,), d_in=2, batch=1)
    pool = replace(pool, factors=InMemoryFactors(A, pool.B))
    assert float(torch.linalg.det(pool.G_A[0])) == pytest.approx(2.0**-24, rel=1e-9)
