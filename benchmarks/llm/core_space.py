"""Merges of other papers that need no data, on the small matrices of Core Space (arXiv:2509.17786).

With orthonormal bases ``U`` of all columns of `B` and ``V`` of all rows of `A`, every delta is ``U M_i V^T`` with a
small ``M_i = (U^T B_i) scale_i (A_i V)``, without loss. A method merges the ``M_i (P, P)``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from legomole.core.merge.merged import LinearCombination, Merged
from legomole.core.merge.methods.consensus import ties
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import RankField, rank_field
from torch import Tensor

_NOISE = 1e-12  # squared singular values of the stacked factors below this share of the largest are rounding noise


@dataclass(frozen=True)
class CoreSpace:
    """Merge the core matrices, then keep the best rank-k approximation.

    Args:
        rank: Merged rank.
    """

    rank: RankField = rank_field()

    def __call__(self, pool: Pool) -> Merged:
        k = self.rank.resolve(pool).clamp_max(pool.max_rank)
        width = int(k.max())
        R_A, R_B = pool.G_A.new_zeros(pool.batch, width, pool.size), pool.G_A.new_zeros(pool.batch, pool.size, width)
        for m, k_m in enumerate(k.tolist()):
            (L_A, to_A), (L_B, to_B) = _basis(pool.G_A[m]), _basis(pool.G_B[m])
            cores = [L_B[at].mT @ (pool.c[m, at, None] * L_A[at]) for at in pool.spans]
            U, S, Vh = torch.linalg.svd(self.merge(cores), full_matrices=False)
            n, root = min(k_m, len(S)), S.sqrt()
            R_A[m, :n] = root[:n, None] * (Vh[:n] @ to_A)
            R_B[m, :, :n] = to_B.mT @ U[:, :n] * root[:n]
        return LinearCombination(R_A, R_B, k).apply(pool)

    def merge(self, cores: Sequence[Tensor]) -> Tensor:
        """Merge matrices ``(P_B, P_A)`` float64."""
        raise NotImplementedError


def _basis(G: Tensor) -> tuple[Tensor, Tensor]:
    """``L (P, n)`` with ``G = L L^T``, and ``(n, P)`` whose product with the units is an orthonormal basis."""
    values, vectors = torch.linalg.eigh(G)
    keep = values > _NOISE * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    root, vectors = values[keep].sqrt().flip(0), vectors[:, keep].flip(1)
    return vectors * root, (vectors / root).mT


@dataclass(frozen=True)
class CoreTies(CoreSpace):
    """TIES on core matrices. Source: arXiv:2509.17786."""

    density: float = 0.5

    def merge(self, cores: Sequence[Tensor]) -> Tensor:
        return ties(cores.__getitem__, [1.0] * len(cores), self.density)


@dataclass(frozen=True)
class TSV(CoreSpace):
    """Task singular vectors in Core Space: each task keeps its share of them, and all are made orthogonal.

    Source: TSV-Merge, arXiv:2412.00081.
    """

    def merge(self, cores: Sequence[Tensor]) -> Tensor:
        parts = [torch.linalg.svd(core, full_matrices=False) for core in cores]
        n = max(1, min(cores[0].shape) // len(cores))
        U, S, Vh = (torch.cat([part[i][..., :n] if i < 2 else part[i][:n].mT for part in parts], -1) for i in range(3))
        return (_orthogonal(U) * S) @ _orthogonal(Vh).mT


def _orthogonal(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns (or rows)."""
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


@dataclass(frozen=True)
class Iso(CoreSpace):
    """Isotropic merge in Core Space: the sum with all its singular values at their mean.

    Truncated to rank `k`, it keeps the sum's k largest directions. Source: Iso-C, arXiv:2502.04959.
    """

    def merge(self, cores: Sequence[Tensor]) -> Tensor:
        U, S, Vh = torch.linalg.svd(torch.stack(list(cores)).sum(0), full_matrices=False)
        falling = 1 + 1e-9 * torch.arange(len(S), 0, -1, dtype=S.dtype)  # keeps the order of the directions
        return (U * (S.mean() * falling)) @ Vh


@dataclass(frozen=True)
class CompressThenMerge(CoreSpace):
    """Bring the norms to their mean, compress all deltas to shared bases of rank k, and merge there by TIES.

    The shared bases are a Tucker-2 decomposition of the stacked core matrices, by alternating least squares.
    Source: Compress-then-Merge, arXiv:2606.03723.
    """

    density: float = 0.5
    steps: int = 10

    def merge(self, cores: Sequence[Tensor]) -> Tensor:
        stack = torch.stack(list(cores))
        norms = stack.flatten(1).norm(dim=1).clamp_min(1e-30)
        stack = stack * (norms.mean() / norms)[:, None, None]
        k = max(1, min(int(self.rank.value), *stack.shape[1:]))
        V = torch.linalg.svd(stack.flatten(0, 1), full_matrices=False)[2][:k].mT
        U = V
        for _ in range(self.steps):
            U = torch.linalg.svd(torch.cat(list(stack @ V), 1), full_matrices=False)[0][:, :k]
            V = torch.linalg.svd(torch.cat(list(U.mT @ stack), 0), full_matrices=False)[2][:k].mT
        small = U.mT @ stack @ V
        return U @ ties(small.__getitem__, [1.0] * len(cores), self.density) @ V.mT
