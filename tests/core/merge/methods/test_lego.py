"""LEGO: the paper's equations by hand, the properties it rests on, and those the rank-one geometry adds."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from legomole.core.merge.factors import InMemoryFactors
from legomole.core.merge.merged import relative_error
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat, fold_scales
from legomole.core.merge.methods.lego import Lego, balance_units, unit_norms
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from torch import Tensor

from ..pools import close, make_pool, product, random_pool, total

seeds = st.integers(0, 10_000)
ranks = st.lists(st.integers(1, 4), min_size=1, max_size=3)
geometries = pytest.mark.parametrize("geometry", ["paper", "rank-one"])
PLAIN = {"parameter_reweight": False, "output_reweight": False}


def row(*values: float) -> Tensor:
    return torch.tensor([[list(values)]])


def column(*values: float) -> Tensor:
    return torch.tensor([[[value] for value in values]])


def permuted(pool: Pool, order: Tensor) -> Pool:
    """Units in another order within their adapters."""
    return replace(pool, factors=InMemoryFactors(pool.A[:, order], pool.B[:, :, order]), scale=pool.scale[:, order])


def refactored(pool: Pool, seed: int) -> Pool:
    """The same deltas from other factors: ``(R A, B R^-1)`` with a well-conditioned R for every adapter."""
    g = torch.Generator().manual_seed(seed)
    A, B = [], []
    for a, b in zip(pool.split(pool.A, 1), pool.split(pool.B, 2), strict=True):
        r = a.shape[1]
        Q1, Q2 = (torch.linalg.qr(torch.randn(r, r, generator=g)).Q for _ in range(2))
        size = 0.5 + 2 * torch.rand(r, generator=g)
        A.append(Q1 @ (size[:, None] * Q2) @ a)
        B.append(b @ Q2.mT @ (Q1.mT / size[:, None]))
    return replace(pool, factors=InMemoryFactors(torch.cat(A, 1), torch.cat(B, 2)))


class TestPaper:
    """x_1 = (2, 0 | 2, 0) and x_2 = (0, 2 | 0, 2): the mean is (1, 1 | 1, 1)."""

    pool = make_pool([row(2, 0), row(0, 2)], [column(2, 0), column(0, 2)])

    def test_centroid_by_hand(self):
        merged = Lego(Rank(1), "paper", **PLAIN)(self.pool)
        assert merged.A.tolist() == [[[1.0, 1.0]]]
        assert merged.B.tolist() == [[[1.0], [1.0]]]
        assert merged.labels.tolist() == [[0, 0]]

    def test_parameter_reweighting_inf_by_hand(self):
        # members' largest entries 2 and 2, centroid's 1: times 2
        merged = Lego(Rank(1), "paper", output_reweight=False)(self.pool)
        assert merged.A.tolist() == [[[2.0, 2.0]]]
        assert merged.B.tolist() == [[[2.0], [2.0]]]

    def test_parameter_reweighting_l2_by_hand(self):
        # |x_1| = |x_2| = sqrt 8, centroid 2: times sqrt 2
        merged = Lego(Rank(1), "paper", output_reweight=False, norm="l2")(self.pool)
        assert torch.allclose(merged.A, torch.full((1, 1, 2), math.sqrt(2)))
        assert torch.allclose(product(merged), torch.full((1, 2, 2), 2.0).double())

    def test_output_reweighting_by_hand(self):
        # one adapter of rank 2 cut to k = 1: B times sqrt(2 / 1), A as it was
        one = make_pool([torch.cat([row(2, 0), row(0, 2)], 1)], [torch.cat([column(2, 0), column(0, 2)], 2)])
        merged = Lego(Rank(1), "paper", parameter_reweight=False)(one)
        assert merged.A.tolist() == [[[1.0, 1.0]]]
        assert torch.allclose(merged.B, torch.full((1, 2, 1), math.sqrt(2)))

    def test_sum_centroid_by_hand(self):
        # the unit b a^T counts twice: each half times sqrt 2
        merged = Lego(Rank(1), "paper", centroid="sum", **PLAIN)(self.pool)
        assert torch.allclose(product(merged), torch.full((1, 2, 2), 2.0).double())

    def test_weight_and_scale_are_folded_before_clustering(self):
        # c = 4 doubles both halves of x_1: mean of (4, 0 | 4, 0) and (0, 2 | 0, 2)
        pool = make_pool([row(2, 0), row(0, 2)], [column(2, 0), column(0, 2)], weights=[8.0, 1.0], scales=[0.5, 1.0])
        merged = Lego(Rank(1), "paper", **PLAIN)(pool)
        assert merged.A.tolist() == [[[2.0, 1.0]]]
        assert merged.B.tolist() == [[[2.0], [1.0]]]

    def test_a_negative_weight_turns_b(self):
        pool = make_pool([row(2, 0), row(0, 2)], [column(2, 0), column(0, 2)], weights=[1.0, -1.0])
        merged = Lego(Rank(1), "paper", **PLAIN)(pool)
        assert merged.A.tolist() == [[[1.0, 1.0]]]
        assert merged.B.tolist() == [[[1.0], [-1.0]]]

    def test_clusters_are_those_of_the_concatenated_halves(self):
        # a alone would pair units 0 and 1, b alone 1 and 2; together |x_0 - x_1|^2 = 100, |x_1 - x_2|^2 = 9
        A = torch.tensor([[[0.0, 0], [0, 0], [3, 0]]])
        B = torch.tensor([[[0.0, 10, 10], [0, 0, 0]]])
        assert Lego(Rank(2), "paper")(make_pool([A], [B])).labels.tolist() == [[0, 1, 1]]


class TestProperties:
    @geometries
    @given(seed=seeds, ranks=ranks)
    @settings(max_examples=20, deadline=None)
    def test_as_many_clusters_as_units_is_the_exact_sum(self, geometry, seed, ranks):
        n = len(ranks)
        pool = random_pool(ranks, weights=[0.7, -1.5, 2.0][:n], scales=[0.5, 2.0, 1.0][:n], seed=seed)
        merged = Lego(Rank(sum(ranks)), geometry, **PLAIN)(pool)
        assert close(product(merged), total(pool), 1e-4)
        assert close(product(merged), product(Concat()(pool)), 1e-4)

    @geometries
    def test_as_many_clusters_as_units_leaves_nothing_to_reweight(self, geometry):
        pool = random_pool((3, 3))
        merged = Lego(Rank(6), geometry, parameter_reweight=True, output_reweight=False)(pool)
        assert close(product(merged), total(pool), 1e-4)

    @geometries
    def test_one_adapter_at_its_rank_is_that_adapter(self, geometry):
        pool = random_pool((4,), weights=[-0.5], scales=[2.0])
        assert close(product(Lego(Rank(4), geometry)(pool)), total(pool), 1e-4)

    @geometries
    @given(seed=seeds, k=st.integers(1, 7))
    @settings(max_examples=20, deadline=None)
    def test_the_order_of_an_adapters_units_does_not_matter(self, geometry, seed, k):
        pool = random_pool((3, 4), weights=[0.7, -1.5], seed=seed)
        g = torch.Generator().manual_seed(seed)
        order = torch.cat([torch.randperm(3, generator=g), 3 + torch.randperm(4, generator=g)])
        method = Lego(Rank(k), geometry, starts=2)
        assert close(product(method(permuted(pool, order))), product(method(pool)), 1e-3)

    @geometries
    def test_the_order_of_the_adapters_does_not_matter(self, geometry):
        one, two = random_pool((3,), seed=1), random_pool((2,), seed=2)
        forth = make_pool([one.A, two.A], [one.B, two.B], weights=[0.5, -1.0])
        back = make_pool([two.A, one.A], [two.B, one.B], weights=[-1.0, 0.5])
        method = Lego(Rank(3), geometry, starts=2)
        assert close(product(method(back)), product(method(forth)), 1e-3)

    @geometries
    @pytest.mark.parametrize("norm", ["inf", "l2"])
    def test_parameter_reweighting_gives_each_unit_its_members_mean_norm(self, geometry, norm):
        pool = random_pool((4, 4), weights=[0.7, -1.5])
        method = Lego(Rank(3), geometry, "mean", parameter_reweight=True, output_reweight=False, norm=norm)
        merged = method(pool)
        members = unit_norms(*(fold_scales if geometry == "paper" else balance_units)(pool).units(pool), geometry, norm)
        units = unit_norms(merged.A, merged.B, geometry, norm)
        for m in range(pool.batch):
            for c in range(3):
                expected = float(members[m][merged.labels[m] == c].mean())
                assert float(units[m, c]) == pytest.approx(expected, rel=1e-4)

    @geometries
    def test_output_reweighting_is_a_factor_of_the_mean_rank_over_k(self, geometry):
        pool = random_pool((2, 4))
        plain = product(Lego(Rank(5), geometry, output_reweight=False)(pool))
        louder = product(Lego(Rank(5), geometry, output_reweight=True)(pool))
        assert close(louder, math.sqrt(3 / 5) * plain, 1e-6)

    @geometries
    def test_the_same_call_twice_gives_the_same_bits(self, geometry):
        pool = random_pool((4, 4))
        first = Lego(Rank(3), geometry)(pool)
        torch.manual_seed(99)
        second = Lego(Rank(3), geometry)(pool)
        assert torch.equal(first.A, second.A)
        assert torch.equal(first.B, second.B)

    @geometries
    def test_a_module_does_not_depend_on_its_batch(self, geometry):
        pool = random_pool((4, 4), batch=4)
        together = product(Lego(Rank(3), geometry, starts=3)(pool))
        for m in range(4):
            at = slice(m, m + 1)
            factors = InMemoryFactors(pool.A[at], pool.B[at])
            alone = Pool((pool.names[m],), factors, pool.scale[at], pool.weights[at], pool.ranks, pool.adapters)
            assert close(product(Lego(Rank(3), geometry, starts=3)(alone)), together[at], 1e-5)

    @geometries
    def test_differing_k_pads_with_zeros(self, geometry):
        A = torch.eye(4).repeat(2, 1, 1)
        B = torch.diag_embed(torch.tensor([[10.0, 0.1, 0.1, 0.1], [2.0, 2.0, 2.0, 2.0]]))
        merged = Lego(Rank(90, "%"), geometry)(make_pool([A], [B]))
        assert merged.ranks.tolist() == [1, 4]
        assert not merged.A[0, 1:].any()
        assert not merged.B[0, :, 1:].any()

    @geometries
    def test_zero_modules_and_zero_units_stay_finite(self, geometry):
        pool = random_pool((3, 3))
        pool.A[0] = 0
        pool.B[1, :, 2] = 0
        for parameter_reweight in (False, True):
            merged = Lego(Rank(3), geometry, parameter_reweight=parameter_reweight)(pool)
            assert torch.isfinite(merged.A).all()
            assert torch.isfinite(merged.B).all()
            assert not product(merged)[0].any()

    @geometries
    def test_labels_cover_every_unit_with_every_cluster(self, geometry):
        merged = Lego(Rank(3), geometry)(random_pool((4, 2)))
        assert merged.labels.shape == (3, 6)
        assert [sorted(set(labels.tolist())) for labels in merged.labels] == [[0, 1, 2]] * 3


class TestRankOne:
    @given(seeds, st.integers(1, 7))
    @settings(max_examples=20, deadline=None)
    def test_other_factors_of_the_same_deltas_give_the_same_merge(self, seed, k):
        pool = random_pool((3, 4), weights=[0.7, -1.5], seed=seed)
        other = refactored(pool, seed)
        assert close(total(other), total(pool), 1e-4)
        assume(_gap(pool) > 1e-2)  # where two singular values of an adapter meet, its balanced form is not unique
        method = Lego(Rank(k))
        assert close(product(method(other)), product(method(pool)), 1e-2)

    @given(seeds)
    @settings(max_examples=20, deadline=None)
    def test_signs_and_sizes_of_the_halves_do_not_matter(self, seed):
        pool = random_pool((3, 4), seed=seed)
        g = torch.Generator().manual_seed(seed)
        factor = (0.1 + 10 * torch.rand(7, generator=g)) * torch.randn(7, generator=g).sign()
        other = replace(pool, factors=InMemoryFactors(pool.A * factor[:, None], pool.B / factor))
        assume(_gap(pool) > 1e-2)
        assert close(product(Lego(Rank(3))(other)), product(Lego(Rank(3))(pool)), 1e-2)

    @pytest.mark.parametrize("kind", ["copies", "flipped", "refactored"])
    def test_the_same_lora_three_times_is_three_times_the_lora(self, kind):
        one = random_pool((4,))
        copies = [one, one, one]
        if kind == "flipped":
            copies = [one, replace(one, factors=InMemoryFactors(-one.A, -one.B)), one]
        if kind == "refactored":
            copies = [refactored(one, seed) for seed in range(3)]
        pool = make_pool([copy.A for copy in copies], [copy.B for copy in copies])
        merged = Lego(Rank(4))(pool)
        assert close(product(merged), 3 * total(one), 1e-4)
        assert merged.labels.tolist() == [[0, 1, 2, 3] * 3] * 3

    def test_the_paper_geometry_does_not_give_three_times_the_lora(self):
        one = random_pool((4,))
        pool = make_pool([one.A, -one.A, one.A], [one.B, -one.B, one.B])
        assert relative_error(pool, Lego(Rank(4), "paper", "sum", **PLAIN)(pool)).min() > 0.1

    def test_subtracting_a_lora_from_itself_leaves_nothing(self):
        one = random_pool((4,))
        pool = make_pool([one.A, one.A], [one.B, one.B], weights=[1.0, -1.0])
        # opposite units are as far apart as two of that size can be: they are not clustered, all 8 are kept
        assert product(Lego(Rank(8))(pool)).abs().max() < 1e-5

    def test_compressing_one_adapter_keeps_its_largest_direction(self):
        # orthogonal units of size 9, 4 and 1 into two clusters: merging the small ones raises the inertia least.
        # The best rank one of (4 u + 1 v) / 2 is 2 u, times two members: 4 u. The unit v is lost
        pool = make_pool([torch.diag(torch.tensor([3.0, 2, 1]))[None]], [torch.diag(torch.tensor([3.0, 2, 1]))[None]])
        merged = Lego(Rank(2))(pool)
        assert torch.allclose(product(merged)[0], torch.diag(torch.tensor([9.0, 4, 0])).double(), atol=1e-5)
        assert merged.labels.tolist() == [[0, 1, 1]]

    def test_mean_by_hand(self):
        pool = make_pool([torch.diag(torch.tensor([3.0, 2, 1]))[None]], [torch.diag(torch.tensor([3.0, 2, 1]))[None]])
        merged = Lego(Rank(2), centroid="mean")(pool)
        assert torch.allclose(product(merged)[0], torch.diag(torch.tensor([9.0, 2, 0])).double(), atol=1e-5)

    @pytest.mark.parametrize(("norm", "size"), [("l2", 5.0), ("inf", 5.0)])
    def test_parameter_reweighting_by_hand(self, norm, size):
        # units 6 e1 e1^T and 4 e2 e2^T in one cluster: the mean's best rank one is 3 e1 e1^T, the members' mean norm 5
        pool = make_pool([torch.eye(2)[None]], [torch.diag(torch.tensor([6.0, 4.0]))[None]])
        merged = Lego(Rank(1), centroid="mean", parameter_reweight=True, norm=norm)(pool)
        assert torch.allclose(product(merged)[0], torch.diag(torch.tensor([size, 0.0])).double(), atol=1e-4)

    def test_at_the_same_rank_it_is_close_to_the_svd_and_never_better(self):
        pool = random_pool((4, 4, 4), d_in=40, d_out=40)
        ours, theirs = (relative_error(pool, method(pool)) for method in (Lego(Rank(6)), SVD(Rank(6))))
        assert (ours >= theirs - 1e-6).all()
        assert (ours < 1).all()


def test_folded_and_balanced_keep_every_adapters_delta():
    pool = random_pool((3, 2), weights=[0.7, -1.5], scales=[0.5, 2.0])
    for basis in (fold_scales(pool), balance_units(pool)):
        units = basis.apply(pool)
        for A, B, D in zip(pool.split(units.A, 1), pool.split(units.B, 2), _deltas(pool), strict=True):
            assert close(B.double() @ A.double(), D)


def test_balanced_halves_are_orthogonal_and_of_equal_size():
    pool = random_pool((3, 2), weights=[0.7, -1.5])
    units = balance_units(pool).apply(pool)
    for A, B in zip(pool.split(units.A, 1), pool.split(units.B, 2), strict=True):
        S = torch.diag_embed((A @ A.mT).diagonal(dim1=1, dim2=2))
        assert torch.allclose(A @ A.mT, S, atol=1e-4)
        assert torch.allclose(B.mT @ B, S, atol=1e-4)


def _deltas(pool: Pool) -> list[Tensor]:
    parts = zip(pool.split(pool.A, 1), pool.split(pool.B, 2), pool.split(pool.c, 1), strict=True)
    return [B.double() * c[:, None] @ A.double() for A, B, c in parts]


def _gap(pool: Pool) -> float:
    """Smallest relative distance between neighbouring singular values of one adapter."""
    gaps = []
    for D in _deltas(pool):
        S = torch.linalg.svdvals(D)
        r = int((S[0] / S[0, 0] > 1e-6).sum())
        gaps.append(float(((S[:, : r - 1] - S[:, 1:r]) / S[:, :1]).min()) if r > 1 else 1.0)
    return min(gaps)


# ---- with statistics


def measured(pool: Pool) -> Statistics:
    d = pool.A.shape[2]
    X = torch.randn(4, 3 * d, d, generator=torch.Generator().manual_seed(5))
    own0, own1, joint, base = X.mT @ X / (3 * d)
    return Statistics(dict.fromkeys(pool.names, ModuleStatistics({0: own0, 1: own1}, {(0, 1): joint}, base)))


def test_calibrated_units_add_up_to_the_calibrated_merge():
    # as many clusters as units: every unit stays, so the sum is Calibrated's W before its truncation
    pool = random_pool((3, 2), weights=[0.7, -1.5])
    merged = Lego(Rank(5), statistics=measured(pool))(pool)
    assert close(product(merged), product(Calibrated(Rank(5), measured(pool))(pool)), 1e-4)


def test_calibrated_units_are_clustered_as_units_are():
    # white inputs, nothing joint: every unit is only scaled, by 1 / (2 + lam) up to the ridge, so the clusters stay
    pool = random_pool((4, 4), seed=3)
    eye = torch.eye(pool.A.shape[2])
    statistics = Statistics(dict.fromkeys(pool.names, ModuleStatistics({0: eye, 1: eye}, base=eye)))
    plain, calibrated = Lego(Rank(4))(pool), Lego(Rank(4), statistics=statistics)(pool)
    assert torch.equal(plain.labels, calibrated.labels)
    # lam = 0.3, tau = 1e-3 * 2.3: (1 + tau) / (2.3 + tau)
    assert close(product(calibrated), 1.0023 / 2.3023 * product(plain), 1e-4)


def test_a_module_that_was_not_measured_is_not_calibrated_but_named():
    pool = random_pool((3, 2))
    merged = Lego(Rank(3), statistics=Statistics({}))(pool)
    assert close(product(merged), product(Lego(Rank(3))(pool)), 1e-5)
    assert list(merged.remarks) == list(pool.names)
