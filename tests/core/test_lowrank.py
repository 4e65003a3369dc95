"""LowRank: its checks, and its algebra against dense matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.errors import FormatError, MergeError
from legomole.core.lowrank import LowRank, best_rank_k, concat, merge_dtype, truncated_svd

from .merge.pools import best, close

seeds = st.integers(0, 10_000)


def part(rank: int, d_out: int = 6, d_in: int = 5, seed: int = 0, **kw) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), **kw)


def spectrum(S: torch.Tensor, d_out: int, d_in: int, seed: int = 0) -> torch.Tensor:
    """``(d_out, d_in)`` float64 matrix with the singular values `S`."""
    g = torch.Generator().manual_seed(seed)
    U = torch.linalg.qr(torch.randn(d_out, len(S), generator=g, dtype=torch.float64)).Q
    V = torch.linalg.qr(torch.randn(d_in, len(S), generator=g, dtype=torch.float64)).Q
    return U * S @ V.mT


class TestLowRank:
    def test_delta_by_hand(self):
        # alpha 4 at rank 2: scale 2. B A = [[1, 2], [3, 6]] + [[0, 0], [0, 5]]
        low = LowRank(torch.tensor([[1.0, 2.0], [0.0, 5.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]]), alpha=4.0)
        assert (low.rank, low.d_in, low.d_out, low.scale) == (2, 2, 2, 2.0)
        assert low.delta().tolist() == [[2.0, 4.0], [6.0, 22.0]]

    def test_no_alpha_means_scale_one(self):
        assert part(3).scale == 1.0

    @pytest.mark.parametrize(
        ("A", "B", "match"),
        [
            (torch.zeros(2, 3), torch.zeros(4, 3), "do not fit together"),
            (torch.zeros(0, 3), torch.zeros(4, 0), "do not fit together"),
            (torch.zeros(2, 0), torch.zeros(4, 2), "do not fit together"),
            (torch.zeros(2, 3), torch.zeros(0, 2), "do not fit together"),
            (torch.zeros(2, 3, 1), torch.zeros(4, 2), "Factor A is not"),
            (torch.zeros(2, 3), torch.zeros(4, 2, dtype=torch.int8), "Factor B is not"),
        ],
    )
    def test_factors_that_do_not_fit_are_refused(self, A, B, match):
        with pytest.raises(FormatError, match=match):
            LowRank(A, B)

    def test_kernel_and_alpha_are_checked(self):
        assert part(2, d_in=18, kernel=(3, 3)).kernel == (3, 3)
        with pytest.raises(FormatError, match="kernel does not divide"):
            part(2, d_in=5, kernel=(3, 3))
        for alpha in (float("nan"), float("inf")):
            with pytest.raises(FormatError, match="alpha"):
                part(2, alpha=alpha)

    def test_rows_cuts_and_reorders_the_output(self):
        low = part(2, alpha=1.0)
        cut = low.rows([(4, 6), (0, 1)])
        assert torch.equal(cut.delta(), low.delta()[[4, 5, 0]])
        assert cut.A is low.A
        for bad in ([], [(0, 7)], [(2, 2)], [(-1, 2)]):
            with pytest.raises(FormatError, match="out of range"):
                low.rows(bad)

    def test_eight_bit_factors_are_written_back_wider(self):
        assert merge_dtype(torch.float8_e4m3fn) == torch.bfloat16
        assert merge_dtype(torch.float16) == torch.float16
        low = LowRank(torch.ones(1, 2).to(torch.float8_e4m3fn), torch.ones(2, 1, dtype=torch.float16))
        assert low.dtype == torch.float32  # bfloat16 and float16 meet in float32
        assert low.delta().tolist() == [[1.0, 1.0], [1.0, 1.0]]


class TestConcat:
    @given(
        seeds,
        st.lists(
            st.tuples(st.integers(1, 4), st.floats(-3, 3), st.sampled_from([None, 1.0, -2.0])), min_size=1, max_size=4
        ),
    )
    @settings(max_examples=30, deadline=None)
    def test_equals_the_weighted_sum(self, seed, rows):
        parts = [part(rank, seed=seed + i, alpha=alpha) for i, (rank, _, alpha) in enumerate(rows)]
        weights = [weight for _, weight, _ in rows]
        expected = sum(weight * p.delta().double() for weight, p in zip(weights, parts, strict=True))
        together = concat(parts, weights)
        assert together.rank == sum(p.rank for p in parts)
        assert torch.allclose(together.delta().double(), expected, atol=1e-4)

    def test_shapes_must_agree(self):
        with pytest.raises(MergeError, match="different shapes"):
            concat([part(2), part(2, d_in=7)], [1, 1])

    def test_keeps_the_kernel(self):
        assert concat([part(2, d_in=9, kernel=(3, 3)), part(1, d_in=9)], [1, 1]).kernel == (3, 3)


class TestTruncatedSVD:
    @given(seeds, st.integers(1, 8), st.integers(1, 8))
    @settings(max_examples=30, deadline=None)
    def test_equals_the_dense_svd(self, seed, P, k):
        g = torch.Generator().manual_seed(seed)
        A = torch.randn(P, 6, generator=g, dtype=torch.float64)
        B = torch.randn(7, P, generator=g, dtype=torch.float64)
        A_k, B_k = truncated_svd(A, B, k)
        assert (A_k.shape, B_k.shape) == ((k, 6), (7, k))
        assert close(B_k @ A_k, best(B @ A, k), 1e-9)
        assert torch.allclose(A_k @ A_k.mT, B_k.mT @ B_k, atol=1e-9)  # balanced

    def test_rank_deficient(self):
        A = torch.ones(4, 6, dtype=torch.float64)
        B = torch.ones(7, 4, dtype=torch.float64)
        A_k, B_k = truncated_svd(A, B, 3)
        assert close(B_k @ A_k, B @ A, 1e-12)
        assert float(A_k[1:].norm()) < 1e-6


class TestBestRankK:
    def test_small_matrices_exactly(self):
        D = torch.randn(40, 30, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for k in (1, 7, 30):
            A, B = best_rank_k(D, k)
            assert close(B @ A, best(D, k), 1e-10)
            assert torch.allclose(A @ A.mT, B.mT @ B, atol=1e-9)

    @pytest.mark.parametrize("shape", [(500, 400), (400, 500)])
    @pytest.mark.parametrize("decay", [1.0, 0.99])
    def test_large_matrices_as_well_as_the_exact_svd(self, shape, decay):
        # decay 1: all singular values equal, the hardest spectrum to truncate; 0.99: a long slow tail
        S = decay ** torch.arange(400, dtype=torch.float64)
        D = spectrum(S, *shape)
        A, B = best_rank_k(D, 8)
        error = float((D - B @ A).norm())
        assert error <= 1.0005 * float(S[8:].norm())

    def test_large_low_rank_matrices_are_found_exactly(self):
        D = spectrum(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), 500, 400)
        A, B = best_rank_k(D, 3)
        assert close(B @ A, D, 1e-10)

    def test_equal_inputs_equal_results_whatever_the_global_seed(self):
        D = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
        first = best_rank_k(D, 4)
        torch.manual_seed(1)
        second = best_rank_k(D, 4)
        assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))

    def test_a_zero_matrix_gives_zero(self):
        for size in (20, 300):
            A, B = best_rank_k(torch.zeros(size, size), 3)
            assert not A.any() or not B.any()
            assert torch.isfinite(A).all()
            assert torch.isfinite(B).all()
