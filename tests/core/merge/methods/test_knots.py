"""KnOTS in the space of the factors against its dense statement."""

from __future__ import annotations

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from legomole.core.merge.methods.consensus import ties
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank

from ..pools import best, close, deltas, make_pool, product, random_pool, total


def aligned(pool: Pool, m: int) -> tuple[torch.Tensor, torch.Tensor]:
    """U and S V^T of a module's deltas side by side, without their weights, float64."""
    parts = [delta / weight for delta, weight in zip(deltas(pool)[m], pool.weights[m], strict=True)]
    U, S, Vh = torch.linalg.svd(torch.cat(parts, 1), full_matrices=False)
    keep = S / S[0] > 1e-6
    return U[:, keep], S[keep, None] * Vh[keep]


def dense_knots(pool: Pool, k: int, density: float) -> torch.Tensor:
    """The paper's steps on dense float64 matrices: stack side by side, SVD, TIES on S V_i^T, back by U."""
    results = []
    for m, weights in enumerate(pool.weights):
        U, stacked = aligned(pool, m)
        results.append(best(U @ ties(stacked.chunk(len(weights), 1).__getitem__, weights.tolist(), density), k))
    return torch.stack(results)


@given(st.integers(0, 10_000), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_untrimmed_equals_the_dense_statement(seed, ranks, k):
    n = len(ranks)
    pool = random_pool(ranks, weights=[0.7, -1.5, 2.0][:n], scales=[0.5, 2.0, 1.0][:n], seed=seed)
    for m in range(pool.batch):
        size = aligned(pool, m)[1].abs()
        assume(size.min() > 1e-6 * size.max())  # an entry as small as rounding may or may not count in the mean
    assert close(product(Knots(Rank(k), density=1.0)(pool)), dense_knots(pool, k, 1.0), 1e-3)


@pytest.mark.parametrize("density", [0.2, 0.5])
@pytest.mark.parametrize("shape", [(12, 10), (12, 5), (4, 10)])  # also fewer rows or columns than units
def test_trimmed_equals_the_dense_statement(density, shape):
    pool = random_pool((3, 4), *shape, weights=[0.7, 1.5], scales=[0.5, 2.0], seed=4)
    merged = Knots(Rank(3), density)(pool)
    assert close(product(merged), dense_knots(pool, 3, density), 1e-3)


def test_one_adapter_untrimmed_is_that_adapter():
    pool = random_pool((4,), weights=[-2.0], scales=[0.5])
    assert close(product(Knots(Rank(4), density=1.0)(pool)), total(pool), 1e-5)


def test_the_same_adapter_twice_untrimmed_is_that_adapter_not_its_double():
    # V_1 = V_2: all entries agree and their mean is taken
    one = random_pool((3,))
    pool = make_pool([one.A, one.A], [one.B, one.B])
    assert close(product(Knots(Rank(3), density=1.0)(pool)), total(one), 1e-4)


def test_refactored_adapters_give_the_same_result():
    one, two = random_pool((3,), seed=1), random_pool((3,), seed=2)
    R = torch.randn(3, 3, generator=torch.Generator().manual_seed(0)) + 3 * torch.eye(3)
    plain = make_pool([one.A, two.A], [one.B, two.B])
    other = make_pool([R @ one.A, -two.A], [one.B @ torch.linalg.inv(R), -two.B])
    assert close(product(Knots(Rank(4))(other)), product(Knots(Rank(4))(plain)), 1e-3)


def test_disjoint_adapters_are_added():
    # different output rows: U separates the adapters, nowhere do two parts meet, so the mean is of one
    one, two = random_pool((2,), d_out=4, seed=1), random_pool((2,), d_out=4, seed=2)
    zero = torch.zeros_like(one.B)
    pool = make_pool([one.A, two.A], [torch.cat([one.B, zero], 1), torch.cat([zero, two.B], 1)])
    assert close(product(Knots(Rank(4), density=1.0)(pool)), total(pool), 1e-4)
    assert close(product(Ties(Rank(4), density=1.0)(pool)), total(pool), 1e-4)


def test_a_zero_module_stays_zero():
    pool = random_pool((2, 2))
    pool.B[1] = 0
    merged = product(Knots(Rank(2))(pool))
    assert not merged[1].any()
    assert merged[0].any()
