"""Linear algebra on Gram matrices against torch.linalg on the dense matrices."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.merge import gram

from .pools import close

seeds = st.integers(0, 10_000)


def factors(M: int, P: int, d_in: int, d_out: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    A = torch.randn(M, P, d_in, generator=g, dtype=torch.float64)
    return A, torch.randn(M, d_out, P, generator=g, dtype=torch.float64)


def check_svd(A: torch.Tensor, B: torch.Tensor, c: torch.Tensor, tolerance: float = 1e-7) -> None:
    """`gram.svd` against torch.linalg.svd: the values, the product, and both factors in balanced form."""
    D = B * c[:, None] @ A
    svd = gram.svd(A @ A.mT, B.mT @ B, c)
    left, right = B @ svd.R_B, svd.R_A @ A
    size = torch.linalg.matrix_norm(D).amax().clamp_min(1e-30)
    n = min(D.shape[1], D.shape[2], A.shape[1])
    values = torch.linalg.svdvals(D)
    assert torch.allclose(svd.S[:, :n], values[:, :n], rtol=0, atol=tolerance * float(size))
    assert float(svd.S[:, n:].abs().sum()) == 0
    assert close(left @ right, D, tolerance)
    for gramian in (left.mT @ left, right @ right.mT):
        assert torch.allclose(gramian, torch.diag_embed(svd.S), rtol=0, atol=tolerance * float(size))


class TestSVD:
    @given(seeds, st.integers(1, 6), st.integers(1, 9), st.integers(1, 9))
    @settings(max_examples=40, deadline=None)
    def test_equals_the_dense_svd(self, seed, P, d_in, d_out):
        A, B = factors(2, P, d_in, d_out, seed)
        c = torch.randn(2, P, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        check_svd(A, B, c, 1e-6)

    @pytest.mark.parametrize("spread", [1e2, 1e4])
    def test_ill_conditioned_factors(self, spread):
        A, B = factors(3, 8, 40, 30)
        slope = torch.logspace(0, -float(np.log10(spread)), 8, dtype=torch.float64)
        # neither orthogonal nor equal in size, and strongly correlated rows
        A = slope[:, None] * A + A[:, :1]
        check_svd(A, B * slope, torch.ones(3, 8, dtype=torch.float64))

    def test_duplicates_and_opposites_are_recognised(self):
        A, B = factors(1, 3, 20, 20)
        A, B = torch.cat([A, A, A], 1), torch.cat([B, B, B], 2)
        c = torch.tensor([[1.0] * 3 + [-1.0] * 3 + [0.5] * 3], dtype=torch.float64)
        check_svd(A, B, c)
        svd = gram.svd(A @ A.mT, B.mT @ B, c)
        assert int((svd.S > 0).sum()) == 3

    def test_exact_cancellation_leaves_noise_only(self):
        A, B = factors(1, 4, 20, 20)
        A, B = torch.cat([A, A], 1), torch.cat([B, B], 2)
        c = torch.tensor([[1.0] * 4 + [-1.0] * 4], dtype=torch.float64)
        svd = gram.svd(A @ A.mT, B.mT @ B, c)
        assert float(((B @ svd.R_B) @ (svd.R_A @ A)).norm()) < 1e-6 * float((B[..., :4] @ A[:, :4]).norm())

    def test_a_zero_module_beside_others_stays_zero_and_finite(self):
        A, B = factors(3, 4, 10, 10)
        B[1] = 0
        A[2] = 0
        svd = gram.svd(A @ A.mT, B.mT @ B, torch.ones(3, 4, dtype=torch.float64))
        assert not svd.S[1:].any()
        assert all(torch.isfinite(x).all() for x in (svd.S, svd.R_A, svd.R_B))
        assert close(((B @ svd.R_B) @ (svd.R_A @ A))[0], B[0] @ A[0], 1e-7)

    def test_a_module_alone_is_decomposed_as_in_company(self):
        A, B = factors(3, 6, 30, 20)
        A[1, 5] = A[1, 0] + A[1, 1]  # one direction less
        G_A, G_B, c = A @ A.mT, B.mT @ B, torch.ones(3, 6, dtype=torch.float64)
        together = gram.svd(G_A, G_B, c)
        for m in range(3):
            alone = gram.svd(G_A[m : m + 1], G_B[m : m + 1], c[m : m + 1])
            for ours, theirs in ((alone.S, together.S), (alone.R_A, together.R_A), (alone.R_B, together.R_B)):
                assert torch.allclose(ours[0], theirs[m], rtol=1e-9, atol=1e-9)
        check_svd(A, B, c)

    def test_by_hand(self):
        # B diag(c) A = [[3, 0], [0, -4]]: singular values 4, 3
        A = torch.eye(2, dtype=torch.float64)[None]
        B = torch.eye(2, dtype=torch.float64)[None]
        svd = gram.svd(A @ A.mT, B.mT @ B, torch.tensor([[3.0, -4.0]], dtype=torch.float64))
        assert torch.allclose(svd.S, torch.tensor([[4.0, 3.0]], dtype=torch.float64))
        # row 0 is sqrt(4) e_2 up to the sign both factors share
        assert torch.allclose(svd.R_A[0, 0].abs(), torch.tensor([0.0, 2.0], dtype=torch.float64), atol=1e-12)
        assert torch.allclose(svd.R_B @ svd.R_A, torch.diag_embed(torch.tensor([[3.0, -4.0]]).double()), atol=1e-12)


@pytest.mark.parametrize("size", [4, 5, 6, 7])
def test_a_gram_matrix_in_blocks_is_the_product(size):
    """Blocks that divide the number of rows, and that do not."""
    X = torch.randn(2, 6, 9, generator=torch.Generator().manual_seed(0))
    G = torch.full((2, 6, 6), torch.nan, dtype=torch.float64)
    gram.gram_matrix(X, torch.float64, G, rows=size // 2, part=2)
    torch.testing.assert_close(G, X.double() @ X.double().mT, rtol=1e-14, atol=1e-14)
    assert torch.equal(G, G.mT)
