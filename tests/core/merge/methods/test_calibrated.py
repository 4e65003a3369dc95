"""Calibrated merge: closed forms, limits, and least squares on dense matrices as oracle."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics, orthonormal
from torch import Tensor

from ..pools import best, close, deltas, product, random_pool, total

seeds = st.integers(0, 10_000)
FULL = Rank(100, "%")


def moment(d: int, seed: int, n: int | None = None) -> Tensor:
    """Second moment of `n` random inputs; fewer than `d` leave directions unmeasured."""
    X = torch.randn(n or 4 * d, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X.mT @ X / len(X)


def everywhere(pool: Pool, moments: ModuleStatistics) -> Statistics:
    return Statistics(dict.fromkeys(pool.names, moments))


def least_squares(D: Tensor, moments: ModuleStatistics, lam: float, mu: float, joint_scale: float) -> Tensor:
    """The objective as one dense least-squares problem in W^T, for deltas ``D (N, d_out, d_in)``.

    ``|W - T|_C^2 = |C^(1/2) (W - T)^T|^2``: every term contributes the rows ``weight^(1/2) C^(1/2)``.
    """
    d = D.shape[2]
    terms = [(1.0, C, D[i]) for i, C in moments.own.items()]
    terms += [(mu, C, joint_scale * D[list(group)].sum(0)) for group, C in moments.joint.items()]
    terms += [] if moments.base is None else [(lam, moments.base, torch.zeros_like(D[0]))]
    tau = 1e-3 * sum(float(weight * C.trace()) for weight, C, _ in terms) / d
    terms.append((tau, torch.eye(d, dtype=D.dtype), D.sum(0)))
    rows, wanted = [], []
    for weight, C, target in terms:
        values, vectors = torch.linalg.eigh(C)
        root = weight**0.5 * vectors * values.clamp_min(0).sqrt() @ vectors.mT
        rows.append(root)
        wanted.append(root @ target.mT)
    return torch.linalg.lstsq(torch.cat(rows), torch.cat(wanted)).solution.mT


def sketched(moments: ModuleStatistics, basis: Tensor) -> ModuleStatistics:
    """Light statistics of full ones."""
    Q = orthonormal(basis.double())
    q, d = Q.shape

    def reduce(C: Tensor) -> Tensor:
        inside = Q @ C @ Q.mT
        return torch.block_diag(inside, ((C.trace() - inside.trace()) / (d - q)).view(1, 1))

    own = {i: reduce(C) for i, C in moments.own.items()}
    joint = {group: reduce(C) for group, C in moments.joint.items()}
    return ModuleStatistics(own, joint, None if moments.base is None else reduce(moments.base), basis)


def dense(moments: ModuleStatistics) -> ModuleStatistics:
    """Full statistics with the matrices that light ones stand for."""
    assert moments.basis is not None
    Q = orthonormal(moments.basis.double())
    outside = torch.eye(Q.shape[1], dtype=Q.dtype) - Q.mT @ Q

    def expand(C: Tensor) -> Tensor:
        return Q.mT @ C[:-1, :-1] @ Q + C[-1, -1] * outside

    own = {i: expand(C) for i, C in moments.own.items()}
    joint = {group: expand(C) for group, C in moments.joint.items()}
    return ModuleStatistics(own, joint, None if moments.base is None else expand(moments.base))


@given(seeds, st.sampled_from([1, 4, 11]), st.sampled_from([torch.float16, torch.float64]))
@settings(max_examples=25, deadline=None)
def test_light_statistics_equal_the_matrices_they_stand_for(seed, q, dtype):
    pool = random_pool((3, 2, 2), weights=[0.7, -1.5, 2.0], scales=[0.5, 2.0, 1.0], batch=2, seed=seed)
    own = {i: moment(12, seed + i) for i in range(3)}
    full = ModuleStatistics(own, {(0, 1): moment(12, seed + 5)}, moment(12, seed + 7))
    light = sketched(full, torch.linalg.qr(moment(12, seed + 9)).Q[:q].to(dtype))
    merged = product(Calibrated(FULL, everywhere(pool, light))(pool))
    assert close(merged, product(Calibrated(FULL, everywhere(pool, dense(light)))(pool)), 1e-5)
    space, rows = light.space(pool.A[0].double()), pool.A[0].double()
    for C, matrix in zip(light.moments(), dense(light).moments(), strict=True):
        assert close(space.gram(C), rows @ matrix @ rows.mT, 1e-6)
        assert space.mean(C) == pytest.approx(float(matrix.diagonal().mean()))


def test_a_basis_of_all_directions_loses_nothing():
    pool = random_pool((3, 2), batch=1)
    full = ModuleStatistics({0: moment(12, 0), 1: moment(12, 1)}, {(0, 1): moment(12, 2)}, moment(12, 3))
    # the twelfth direction is the only one outside, so its own variance is exact; its covariances with others are lost
    Q = torch.linalg.qr(moment(12, 4)).Q
    turned = ModuleStatistics(
        {i: Q @ torch.block_diag(C[:-1, :-1], C[-1:, -1:]) @ Q.mT for i, C in full.own.items()},
        base=torch.eye(12).double(),
    )
    light = sketched(turned, Q.mT[:-1])
    merged = product(Calibrated(FULL, everywhere(pool, light))(pool))
    assert close(merged, product(Calibrated(FULL, everywhere(pool, turned))(pool)), 1e-5)


@given(seeds, st.floats(0, 5), st.floats(0, 10), st.floats(0.5, 2), st.sampled_from([3, 40]))
@settings(max_examples=25, deadline=None)
def test_equals_dense_least_squares(seed, lam, mu, joint_scale, n):
    pool = random_pool((3, 2, 2), weights=[0.7, -1.5, 2.0], scales=[0.5, 2.0, 1.0], batch=2, seed=seed)
    own = {i: moment(12, seed + i, n) for i in range(3)}
    joint = {(0, 1): moment(12, seed + 5, n), (0, 1, 2): moment(12, seed + 6, n)}
    moments = ModuleStatistics(own, joint, moment(12, seed + 7, n))
    expected = torch.stack([least_squares(D, moments, lam, mu, joint_scale) for D in deltas(pool)])
    merged = Calibrated(FULL, everywhere(pool, moments), lam, mu, joint_scale)(pool)
    assert close(product(merged), expected, 1e-4)


def test_white_inputs_scale_every_adapter_by_hand():
    # C = I everywhere, N = 2, one joint term: G = (2 + mu + lam)(1 + 1e-3) I and
    # M_i = (1 + mu s + tau) I with tau = 1e-3 (2 + mu + lam). With lam = 0.3, mu = 3, s = 1.2:
    # tau = 0.0053, W = (1 + 3.6 + 0.0053) / 5.3053 (delta_1 + delta_2)
    pool = random_pool((3, 2), weights=[0.7, -1.5])
    eye = torch.eye(12)
    statistics = everywhere(pool, ModuleStatistics({0: eye, 1: eye}, {(0, 1): eye}, eye))
    merged = Calibrated(Rank(5), statistics)(pool)
    assert close(product(merged), 4.6053 / 5.3053 * total(pool), 1e-5)


def test_one_adapter_measured_alone_is_that_adapter():
    # W G = delta (C + tau I) with G = C + tau I
    pool = random_pool((4,), weights=[-0.5])
    statistics = everywhere(pool, ModuleStatistics({0: moment(12, 0, 5)}, base=moment(12, 1)))
    assert close(product(Calibrated(Rank(4), statistics, lam=0)(pool)), total(pool), 1e-4)


def test_adapters_whose_inputs_never_meet_are_kept_whole():
    # concept 1 lives in the first six inputs, concept 2 in the rest: W acts as each of them on its own inputs
    pool = random_pool((3, 2), batch=1)
    first, second = torch.diag(torch.tensor([1.0] * 6 + [0.0] * 6)), torch.diag(torch.tensor([0.0] * 6 + [1.0] * 6))
    W = product(Calibrated(FULL, everywhere(pool, ModuleStatistics({0: first, 1: second})), lam=0)(pool))[0]
    D = deltas(pool)[0]
    # first + second = I, so tau = 1e-3, G = (1 + tau) I, M_1 = first + tau I, M_2 = second + tau I
    tau = 1e-3
    expected = (D[0] @ first.double() + D[1] @ second.double() + tau * D.sum(0)) / (1 + tau)
    assert close(W, expected, 1e-5)


def test_a_heavy_base_term_silences_what_the_base_uses():
    # base inputs fill the first six directions: there W vanishes, elsewhere it is the adapter
    pool = random_pool((3,), batch=1)
    base = torch.diag(torch.tensor([1.0] * 6 + [0.0] * 6))
    W = product(Calibrated(FULL, everywhere(pool, ModuleStatistics({0: torch.eye(12)}, base=base)), lam=1e4)(pool))[0]
    # tau = 1e-3 (12 + 6e4) / 12 = 5.001: first half (1 + tau) / (1 + tau + 1e4), second half 1
    ratio = 6.001 / 10_006.001
    expected = total(pool)[0] * torch.tensor([ratio] * 6 + [1.0] * 6).double()
    assert close(W, expected, 1e-5)


def test_without_any_measured_energy_it_is_the_sum():
    pool = random_pool((3, 2))
    statistics = everywhere(pool, ModuleStatistics({0: torch.zeros(12, 12)}))
    assert close(product(Calibrated(FULL, statistics)(pool)), total(pool))


def test_it_is_cut_to_the_best_matrix_of_the_rank():
    pool = random_pool((3, 2))
    statistics = everywhere(pool, ModuleStatistics({0: moment(12, 0), 1: moment(12, 1)}, {(0, 1): moment(12, 2)}))
    whole = product(Calibrated(Rank(5), statistics)(pool))
    cut = Calibrated(Rank(2), statistics)(pool)
    assert cut.ranks.tolist() == [2, 2, 2]
    assert close(product(cut), best(whole, 2), 1e-4)


def test_a_module_without_statistics_gets_the_svd_of_the_sum_and_a_remark():
    pool = random_pool((3, 2))
    statistics = Statistics({"m1": ModuleStatistics({0: moment(12, 0), 1: moment(12, 1)})})
    merged = Calibrated(Rank(3), statistics)(pool)
    plain = product(SVD(Rank(3))(pool))
    assert close(product(merged)[[0, 2]], plain[[0, 2]])
    assert not close(product(merged)[1], plain[1], 1e-2)
    assert set(merged.remarks) == {"m0", "m2"}


def test_the_report_lists_which_modules_had_no_statistics():
    g = torch.Generator().manual_seed(0)
    modules = {name: LowRank(torch.randn(2, 4, generator=g), torch.randn(3, 2, generator=g)) for name in "abc"}
    statistics = Statistics({"b": ModuleStatistics({0: torch.eye(4)})})
    report = merge([Adapter(modules)], Calibrated(Rank(2), statistics)).report
    assert report.method == "calibrated"
    assert report.notes == ("2 modules have no statistics and got the plain SVD of the sum: a, c",)


def test_inputs_of_a_concept_count_where_its_adapter_has_no_module():
    # adapter 1 lacks the module: on its inputs the wanted change is none, just as for the base
    pool = random_pool((3,), batch=1)
    C = moment(12, 0)
    away = product(Calibrated(FULL, everywhere(pool, ModuleStatistics({0: C, 1: moment(12, 1)})))(pool))
    base = product(Calibrated(FULL, everywhere(pool, ModuleStatistics({0: C}, base=moment(12, 1))), lam=1.0)(pool))
    assert close(away, base, 1e-5)


def test_statistics_of_another_width_are_refused():
    pool = random_pool((2,))
    with pytest.raises(MergeError, match=r"another model[\s\S]*m0[\s\S]*width 12[\s\S]*8"):
        Calibrated(Rank(2), everywhere(pool, ModuleStatistics({0: torch.eye(8)})))(pool)


@pytest.mark.parametrize("C", [torch.full((12, 12), float("nan")), -torch.eye(12), torch.eye(12) * float("inf")])
def test_matrices_that_are_no_moments_are_refused(C):
    pool = random_pool((2,))
    with pytest.raises(MergeError, match="not second moments"):
        Calibrated(Rank(2), everywhere(pool, ModuleStatistics({0: C})))(pool)


@pytest.mark.parametrize("setting", [{"lam": -1.0}, {"mu": -0.5}, {"lam": float("nan")}])
def test_negative_weights_are_refused(setting):
    with pytest.raises(MergeError, match="negative"):
        Calibrated(Rank(2), Statistics({}), **setting)


def test_weights_unlike_the_measured_strengths_are_noted():
    g = torch.Generator().manual_seed(0)
    loras = [Adapter({"a": LowRank(torch.randn(2, 4, generator=g), torch.randn(3, 2, generator=g))}) for _ in range(2)]
    method = Calibrated(
        Rank(2), Statistics({"a": ModuleStatistics({0: torch.eye(4), 1: torch.eye(4)})}, strengths=(0.8, 1.0))
    )
    assert merge(loras, method, [0.8, 1.0]).report.notes == ()
    (note,) = merge(loras, method, [0.3, 1.0]).report.notes
    assert "measured at strengths 0.8, 1, the weights are 0.3, 1" in note
