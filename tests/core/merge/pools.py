"""Small pools, and the dense float64 matrices they stand for."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from legomole.core.merge.factors import InMemoryFactors
from legomole.core.merge.merged import Merged
from legomole.core.merge.pool import Pool
from torch import Tensor


def make_pool(
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    names: Sequence[str] | None = None,
) -> Pool:
    """Pool of adapters given by their factors ``A_i (M, r_i, d_in)``, ``B_i (M, d_out, r_i)``."""
    ranks = tuple(a.shape[1] for a in A)
    M, N = A[0].shape[0], len(A)
    w = torch.tensor(weights or [1.0] * N, dtype=torch.float64).repeat(M, 1)
    s = torch.tensor(scales or [1.0] * N, dtype=torch.float64)
    return Pool(
        names=tuple(names or (f"m{m}" for m in range(M))),
        factors=InMemoryFactors(torch.cat([a.float() for a in A], 1), torch.cat([b.float() for b in B], 2)),
        scale=s.repeat(M, 1).repeat_interleave(torch.tensor(ranks), 1),
        weights=w,
        ranks=ranks,
        adapters=tuple(range(N)),
    )


def random_pool(
    ranks: Sequence[int] = (3, 2),
    d_in: int = 12,
    d_out: int = 10,
    batch: int = 3,
    weights: Sequence[float] | None = None,
    scales: Sequence[float] | None = None,
    seed: int = 0,
) -> Pool:
    g = torch.Generator().manual_seed(seed)
    A = [torch.randn(batch, r, d_in, generator=g) for r in ranks]
    B = [torch.randn(batch, d_out, r, generator=g) for r in ranks]
    return make_pool(A, B, weights, scales)


def deltas(pool: Pool) -> Tensor:
    """``(M, N, d_out, d_in)`` float64: each adapter's weighted delta."""
    parts = zip(pool.split(pool.A.double(), 1), pool.split(pool.B.double(), 2), pool.split(pool.c, 1), strict=True)
    return torch.stack([B * c[:, None] @ A for A, B, c in parts], 1)


def total(pool: Pool) -> Tensor:
    """``(M, d_out, d_in)`` float64: the sum of the deltas."""
    return deltas(pool).sum(1)


def product(merged: Merged) -> Tensor:
    """``(M, d_out, d_in)`` float64: the merged delta."""
    return merged.B.double() @ merged.A.double()


def best(D: Tensor, k: int) -> Tensor:
    """Best rank-k approximation, by the SVD of the dense matrices ``(..., d_out, d_in)``."""
    U, S, Vh = torch.linalg.svd(D, full_matrices=False)
    return (U[..., :k] * S[..., None, :k]) @ Vh[..., :k, :]


def close(x: Tensor, y: Tensor, tolerance: float = 1e-5) -> bool:
    """Whether two batches agree relative to the size of the second (float32 factors: 1e-5)."""
    return float((x.double() - y.double()).norm()) <= tolerance * max(1e-30, float(y.double().norm()))
