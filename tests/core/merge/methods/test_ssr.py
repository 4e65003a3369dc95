"""SSR-Merge: the published formula on explicit inputs, and least squares on dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.merge.methods.ssr import SSR
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from torch import Tensor

from ..pools import best, close, deltas, product, random_pool, total

FULL = Rank(100, "%")


def inputs(seed: int, d: int = 12, n: int = 30) -> Tensor:
    return torch.randn(d, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def measured(X: list[Tensor], names: tuple[str, ...] = ("m0", "m1", "m2")) -> Statistics:
    return Statistics(dict.fromkeys(names, ModuleStatistics({k: x @ x.mT / x.shape[1] for k, x in enumerate(X)})))


@given(st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_equals_the_published_formula(seed):
    pool = random_pool((3, 2, 2), weights=[0.7, -1.5, 2.0], scales=[0.5, 2.0, 1.0], batch=1, seed=seed)
    X = [inputs(seed + k) for k in range(3)]
    A, B = pool.A[0].double(), pool.B[0].double() * pool.c[0]
    Z = [A @ x for x in X]
    G = sum(z @ z.mT for z in Z)
    Q = torch.cat([A_k @ x @ z.mT for A_k, x, z in zip(pool.split(A, 0), X, Z, strict=True)])
    expected = B @ Q @ torch.linalg.inv(G) @ A
    assert close(product(SSR(FULL, measured(X))(pool))[0], expected, 1e-4)


def test_no_matrix_with_the_same_rows_is_closer_on_the_loras_own_inputs():
    pool = random_pool((3, 2), batch=1)
    X = [inputs(1), inputs(2)]
    D, A = deltas(pool)[0], pool.A[0].double()
    W = product(SSR(FULL, measured(X))(pool))[0]
    # least squares for B': stack (A X_k)^T B'^T = (delta_k X_k)^T
    design = torch.cat([(A @ x).mT for x in X])
    wanted = torch.cat([(D[k] @ x).mT for k, x in enumerate(X)])
    assert close(W, torch.linalg.lstsq(design, wanted).solution.mT @ A, 1e-4)


def test_one_adapter_is_itself_and_other_kinds_of_prompts_do_not_count():
    pool = random_pool((4,), weights=[-0.5])
    X = inputs(0)
    assert close(product(SSR(FULL, measured([X]))(pool)), total(pool), 1e-4)
    two = random_pool((3, 2))
    plain = measured([inputs(1), inputs(2)])
    more = ModuleStatistics(plain.modules["m0"].own, {(0, 1): 9 * torch.eye(12)}, 9 * torch.eye(12))
    with_others = Statistics(dict.fromkeys(("m0", "m1", "m2"), more))
    assert torch.equal(product(SSR(FULL, plain)(two)), product(SSR(FULL, with_others)(two)))


def test_adapters_whose_inputs_never_meet_are_kept_whole():
    # X_1 fills the first six inputs, X_2 the rest: on X_k the result is exactly delta_k if the rows allow it (d_in = P)
    pool = random_pool((6, 6), batch=1)
    X = [torch.zeros(12, 12).double(), torch.zeros(12, 12).double()]
    X[0][:6, :6], X[1][6:, 6:] = torch.eye(6), torch.eye(6)
    W, D = product(SSR(FULL, measured(X))(pool))[0], deltas(pool)[0]
    for k in range(2):
        assert close(W @ X[k], D[k] @ X[k], 1e-3)


def test_it_is_cut_to_the_best_matrix_of_the_rank():
    pool = random_pool((3, 2))
    statistics = measured([inputs(1), inputs(2)])
    whole = product(SSR(Rank(5), statistics)(pool))
    assert close(product(SSR(Rank(2), statistics)(pool)), best(whole, 2), 1e-4)


def test_a_module_without_own_statistics_gets_the_svd_and_a_remark():
    pool = random_pool((3, 2))
    own = measured([inputs(1), inputs(2)]).modules["m0"]
    statistics = Statistics({"m1": own, "m2": ModuleStatistics(base=torch.eye(12))})
    merged = SSR(Rank(3), statistics)(pool)
    assert close(product(merged)[[0, 2]], product(SVD(Rank(3))(pool))[[0, 2]])
    assert set(merged.remarks) == {"m0", "m2"}


def test_statistics_are_needed_and_must_fit():
    with pytest.raises(MergeError, match=r"needs statistics[\s\S]*calibrated\.md"):
        SSR(4)
    wrong = Statistics({"m0": ModuleStatistics({0: torch.eye(8)})})
    with pytest.raises(MergeError, match="another model"):
        SSR(2, wrong)(random_pool((2,)))
