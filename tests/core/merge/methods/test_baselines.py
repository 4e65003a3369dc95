"""Concat, SVD, Linear: exact statements, and PEFT as oracle."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("peft")

from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.merge.merged import relative_error
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.linear import Linear
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank

from ..pools import best, close, make_pool, product, random_pool, total
from .oracle import peft_delta

seeds = st.integers(0, 10_000)
ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)
WEIGHTS = [0.7, -1.5, 2.0]
SCALES = [0.5, 2.0, 1.0]


@given(seeds, ranks)
@settings(max_examples=25, deadline=None)
def test_concat_is_the_sum_with_all_units(seed, ranks):
    n = len(ranks)
    pool = random_pool(ranks, weights=WEIGHTS[:n], scales=SCALES[:n], seed=seed)
    merged = Concat()(pool)
    assert merged.ranks.tolist() == [sum(ranks)] * 3
    assert close(product(merged), total(pool))


@given(seeds, ranks, st.integers(1, 12))
@settings(max_examples=25, deadline=None)
def test_svd_is_the_best_approximation_of_the_sum(seed, ranks, k):
    n = len(ranks)
    pool = random_pool(ranks, d_out=6, weights=WEIGHTS[:n], scales=SCALES[:n], seed=seed)
    merged = SVD(Rank(k))(pool)
    assert merged.ranks.tolist() == [min(k, sum(ranks), 6)] * 3
    assert close(product(merged), best(total(pool), k), 1e-4)
    # balanced: both factors carry sqrt(S)
    assert torch.allclose(merged.A @ merged.A.mT, merged.B.mT @ merged.B, atol=1e-3)


def test_svd_at_differing_ranks_pads_with_zeros():
    pool = make_pool([torch.eye(3).repeat(2, 1, 1)], [torch.diag_embed(torch.tensor([[3.0, 0.1, 0.1], [1, 1, 1]]))])
    merged = SVD(Rank(90, "%"))(pool)
    assert merged.ranks.tolist() == [1, 3]
    assert not merged.A[0, 1:].any()
    assert not merged.B[0, :, 1:].any()
    assert relative_error(pool, merged).tolist() == [
        pytest.approx((0.02 / 9.02) ** 0.5, rel=1e-5),
        pytest.approx(0, abs=1e-6),
    ]


def test_linear_by_hand():
    # scale-1 adapters of rank 1 and 2; unit 1 of both are added, unit 2 is the second's alone. Weights 4 and -1:
    # A = [2 * (1, 0) + (0, 1); (1, 1)] = [(2, 1); (1, 1)], B = [2 * (1, 0) - (0, 1), -(1, 0)] = [(2, -1), (-1, 0)]
    pool = make_pool(
        [torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 1.0]]])],
        [torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0, 1.0], [1.0, 0.0]]])],
        weights=[4.0, -1.0],
    )
    merged = Linear()(pool)
    assert merged.A[0].tolist() == [[2.0, 1.0], [1.0, 1.0]]
    assert merged.B[0].tolist() == [[2.0, -1.0], [-1.0, 0.0]]


def test_linear_with_one_adapter_is_that_adapter():
    pool = random_pool((4,), weights=[-0.5], scales=[3.0])
    assert close(product(Linear()(pool)), total(pool))


class TestPeft:
    def test_cat(self):
        pool = random_pool((3, 2), weights=[0.7, 1.5], scales=[0.5, 2.0])
        assert close(product(Concat()(pool)), peft_delta(pool, "cat"))

    def test_svd(self):
        pool = random_pool((3, 2), weights=[0.7, -1.5], scales=[0.5, 2.0])
        assert close(product(SVD(Rank(3))(pool)), peft_delta(pool, "svd", svd_rank=3), 1e-4)

    def test_linear(self):
        pool = random_pool((3, 3), weights=[0.7, 1.5], scales=[0.5, 2.0])
        assert close(product(Linear()(pool)), peft_delta(pool, "linear"))
