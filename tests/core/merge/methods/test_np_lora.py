"""NP-LoRA: the published formula on dense matrices, and its limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.merge.methods.np_lora import NP
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from torch import Tensor

from ..pools import best, close, deltas, make_pool, product, random_pool, total

FULL = Rank(100, "%")


def published(pool: Pool, p: int, mu: float) -> Tensor:
    """``(M, d_out, d_in)``, with V from the SVD of the dense delta."""
    D = deltas(pool)
    r = pool.ranks[p]
    V = torch.linalg.svd(D[:, p], full_matrices=False).Vh[:, :r].mT
    others = D.sum(1) - D[:, p]
    return D[:, p] + others - mu / (1 + mu) * others @ V @ V.mT


@given(st.integers(0, 10_000), st.integers(0, 2), st.floats(0, 50))
@settings(max_examples=25, deadline=None)
def test_equals_the_published_formula(seed, p, mu):
    pool = random_pool((3, 2, 2), weights=[0.7, -1.5, 2.0], scales=[0.5, 2.0, 1.0], seed=seed)
    assert close(product(NP(FULL, protect=p + 1, mu=mu)(pool)), published(pool, p, mu), 1e-4)


def test_by_hand():
    # the protected LoRA reads the first input; mu = 3 removes 3/4 of what the other does to it
    A = [torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[4.0, 8.0]]])]
    B = [torch.tensor([[[1.0], [0.0]]]), torch.tensor([[[0.0], [1.0]]])]
    expected = torch.tensor([[1.0, 0.0], [1.0, 8.0]])
    assert close(product(NP(Rank(2), mu=3.0)(make_pool(A, B)))[0], expected)


def test_mu_zero_is_the_sum_and_infinity_the_hard_projection():
    pool = random_pool((3, 2))
    assert close(product(NP(FULL, mu=0.0)(pool)), total(pool))
    hard = product(NP(FULL, mu=float("inf"))(pool))
    V = torch.linalg.svd(deltas(pool)[:, 0], full_matrices=False).Vh[:, :3].mT
    assert close(hard @ V, deltas(pool)[:, 0] @ V, 1e-4)


def test_it_is_cut_to_the_best_matrix_of_the_rank():
    pool = random_pool((3, 2))
    assert close(product(NP(Rank(2))(pool)), best(published(pool, 0, 1.0), 2), 1e-4)


def test_a_module_that_the_protected_lora_lacks_gets_the_svd_of_the_sum():
    pool = random_pool((3, 2))
    assert close(product(NP(Rank(2), protect=3)(pool)), product(SVD(Rank(2))(pool)))


@pytest.mark.parametrize("setting", [{"mu": -1.0}, {"mu": float("nan")}, {"protect": 0}])
def test_settings_out_of_range_are_refused(setting):
    with pytest.raises(MergeError, match="out of range"):
        NP(2, **setting)
