"""Best rank-one approximations in Gram space, against the SVD of dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from legomole.core.merge import gram
from torch import Tensor

from .pools import best, close

seeds = st.integers(0, 10_000)


class TestBestRankOne:
    @staticmethod
    def setup(seed: int, k: int) -> tuple[Tensor, Tensor, Tensor]:
        g = torch.Generator().manual_seed(seed)
        A = torch.randn(2, 6, 8, generator=g, dtype=torch.float64)
        B = torch.randn(2, 7, 6, generator=g, dtype=torch.float64)
        labels = torch.cat([torch.arange(k), torch.randint(k, (6 - k,), generator=g)]).repeat(2, 1)
        return A, B, labels

    @given(seeds, st.integers(1, 6))
    @example(210, 1)  # the largest member lies nearly across the leading direction: slow to turn
    @settings(max_examples=30, deadline=None)
    def test_against_the_svd_of_the_dense_mean(self, seed, k):
        A, B, labels = self.setup(seed, k)
        alpha, beta = gram.best_rank_one(A @ A.mT, B.mT @ B, labels, k)
        a, b = alpha.mT @ A, B @ beta
        for m in range(2):
            for c in range(k):
                member = labels[m] == c
                mean = B[m][:, member] @ A[m][member] / int(member.sum())
                ours = torch.linalg.norm(mean - b[m][:, c : c + 1] @ a[m][c : c + 1])
                exact = torch.linalg.norm(mean - best(mean, 1))
                assert float(ours - exact) <= 0.02 * float(mean.norm())
                assert float(a[m, c].norm()) == pytest.approx(float(b[m, :, c].norm()), rel=1e-6)

    def test_exact_where_one_direction_leads(self):
        g = torch.Generator().manual_seed(0)
        lead_a, lead_b = torch.randn(1, 1, 8, generator=g).double(), torch.randn(1, 7, 1, generator=g).double()
        A = lead_a + 0.2 * torch.randn(1, 4, 8, generator=g).double()
        B = lead_b + 0.2 * torch.randn(1, 7, 4, generator=g).double()
        alpha, beta = gram.best_rank_one(A @ A.mT, B.mT @ B, torch.zeros(1, 4).long(), 1)
        assert close((B @ beta) @ (alpha.mT @ A), best(B @ A / 4, 1), 1e-10)

    @pytest.mark.parametrize("sizes", [(1, 2, 9), (7, 130), (128, 3), (1, 200, 40)])
    def test_clusters_of_every_size_at_once(self, sizes):
        g = torch.Generator().manual_seed(0)
        P, k = sum(sizes), len(sizes)
        labels = torch.repeat_interleave(torch.tensor(sizes))[torch.randperm(P, generator=g)].repeat(2, 1)
        lead_a, lead_b = torch.randn(2, k, 250, generator=g).double(), torch.randn(2, k, 240, generator=g).double()
        rows = torch.arange(2)[:, None]
        A = lead_a[rows, labels] + 0.3 * torch.randn(2, P, 250, generator=g).double()
        B = (lead_b[rows, labels] + 0.3 * torch.randn(2, P, 240, generator=g).double()).mT
        alpha, beta = gram.best_rank_one(A @ A.mT, B.mT @ B, labels, k)
        for m in range(2):
            for c in range(k):
                member = labels[m] == c
                mean = B[m][:, member] @ A[m][member] / int(member.sum())
                assert close((B @ beta)[m, :, c : c + 1] @ (alpha.mT @ A)[m, c : c + 1], best(mean, 1), 1e-8)
                assert not alpha[m, ~member, c].any()
                assert not beta[m, ~member, c].any()

    def test_one_unit_comes_back_as_it_is(self):
        A, B, _ = self.setup(0, 6)
        alpha, beta = gram.best_rank_one(A @ A.mT, B.mT @ B, torch.arange(6).repeat(2, 1), 6)
        for j in range(6):
            ours = (B @ beta)[:, :, j : j + 1] @ (alpha.mT @ A)[:, j : j + 1]
            assert close(ours, B[:, :, j : j + 1] @ A[:, j : j + 1], 1e-12)


def energy_share(A: Tensor, B: Tensor) -> float:
    """The energy of `top_pair`'s matrix over that of the best, for ``A (s, d)`` and ``B (d, s)`` float64."""
    alpha, beta = (x[0] for x in gram.top_pair((A @ A.mT)[None], (B.mT @ B)[None]))
    found = torch.outer(B @ beta, alpha @ A)
    return float((found * (B @ A)).sum() ** 2 / found.square().sum() / torch.linalg.matrix_norm(B @ A, 2) ** 2)


class TestTopPair:
    """The largest unit is orthogonal to the leading direction, which many others share."""

    def test_by_hand(self):
        """e1 e1^T and twice 0.9 e2 e2^T: the best rank one is 1.8 e2 e2^T."""
        A = torch.tensor([[1.0, 0], [0, 0.9], [0, 0.9]], dtype=torch.float64)
        B = torch.tensor([[1.0, 0, 0], [0, 1, 1]], dtype=torch.float64)
        alpha, beta = (x[0] for x in gram.top_pair((A @ A.mT)[None], (B.mT @ B)[None]))
        expected = torch.tensor([[0, 0], [0, 1.8]], dtype=torch.float64)
        torch.testing.assert_close(torch.outer(B @ beta, alpha @ A), expected, rtol=0, atol=1e-12)

    @pytest.mark.parametrize("n", [2, 6, 7, 8, 20, 40, 100, 250, 500, 800])
    @pytest.mark.parametrize("total", [1.05, 1.5, 10])
    @pytest.mark.parametrize("tilt", [0, 1e-9, 1e-4])
    def test_many_small_units_outweigh_a_large_one(self, n: int, total: float, tilt: float):
        A, B = torch.zeros(n + 1, 3).double(), torch.zeros(3, n + 1).double()
        A[0, 0] = B[0, 0] = 1
        A[1:, 1], B[1, 1:] = total / n, 1
        A[0, 1] = tilt
        assert energy_share(A, B) > 0.99

    def test_none_of_several_groups_hides_another(self):
        """Eight orthogonal groups of units, the largest group of the smallest units."""
        sizes = torch.arange(1, 9)
        group = torch.repeat_interleave(sizes - 1, sizes)
        B = torch.nn.functional.one_hot(group).double().mT
        A = B.mT * (1 / (sizes - 0.3)[group])[:, None]  # sums 1.4, 1.18, .. 1.04: the first leads
        assert energy_share(A, B) > 0.99
        A = B.mT * (1 / (sizes**0.8)[group])[:, None]  # sums 1, 1.15, .. 1.5: the last leads
        assert energy_share(A, B) > 0.99

    @given(seeds, st.sampled_from([3, 9, 30, 120]))
    @settings(max_examples=20, deadline=None)
    def test_random_units_with_a_flat_spectrum(self, seed: int, n: int):
        g = torch.Generator().manual_seed(seed)
        A, B = torch.randn(n, 2 * n, generator=g).double(), torch.randn(2 * n, n, generator=g).double()
        assert energy_share(A, B) > 0.9

    def test_opposite_units_leave_nothing(self):
        A, B = torch.ones(2, 3).double(), torch.tensor([[1.0, -1.0]]).double()
        alpha, beta = (x[0] for x in gram.top_pair((A @ A.mT)[None], (B.mT @ B)[None]))
        assert not torch.outer(B @ beta, alpha @ A).any()

    def test_units_in_another_order_give_the_same_matrix(self):
        g = torch.Generator().manual_seed(0)
        A, B = torch.randn(9, 12, generator=g).double(), torch.randn(10, 9, generator=g).double()
        A[0], B[:, 0] = 0, 0
        A[0, 0] = 5  # the largest unit, orthogonal to all others
        A[1:, 0] = 0
        B[0], B[0, 0] = 0, 5
        order = torch.randperm(9, generator=g)
        matrices = []
        for a, b in ((A, B), (A[order], B[:, order])):
            alpha, beta = (x[0] for x in gram.top_pair((a @ a.mT)[None], (b.mT @ b)[None]))
            matrices.append(torch.outer(b @ beta, alpha @ a))
        assert close(*matrices, 1e-12)
