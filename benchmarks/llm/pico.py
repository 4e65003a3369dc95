"""Pico: directions that many adapters write to are turned down before the sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from legomole.core.merge import gram
from legomole.core.merge.merged import LinearCombination, Merged
from legomole.core.merge.methods.lego import balance_units, scale_units
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import RankField, rank_field
from torch import Tensor


@dataclass(frozen=True)
class Pico:
    """``B <- (I + U diag(alpha - 1) U^T) B`` for ``[B_1 .. B_N] = U S V^T``, the sum, then its norm is restored.

    ``alpha_j = 1 / (1 + (N - 1) s_j)`` with ``s_j`` the share of direction j in ``S^2``. Factors are balanced first:
    the norms of `B` in a file depend on the trainer. The result has the mean norm of the adapters.

    Args:
        rank: Merged rank.

    Source: arXiv:2604.16826.
    """

    rank: RankField = rank_field()

    def __call__(self, pool: Pool) -> Merged:
        units = balance_units(pool)
        G_A, G_B = units.R_A @ pool.G_A @ units.R_A.mT, units.R_B.mT @ pool.G_B @ units.R_B
        change = turn_down(G_B, len(pool.ranks))
        svd = gram.svd(G_A, change.mT @ G_B @ change, torch.ones_like(pool.c))
        k = self.rank.resolve(pool).clamp_max(pool.max_rank)
        keep = torch.arange(int(k.max())) < k[:, None]
        width = keep.shape[1]
        merged = LinearCombination(
            svd.R_A[:, :width] * keep[:, :, None] @ units.R_A,
            units.R_B @ change @ svd.R_B[:, :, :width] * keep[:, None],
            k,
        )
        norms = pool.inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt().mean(1)
        size = norms / gram.nonzero_or_one(svd.S.square().sum(1).sqrt())
        return scale_units(merged, size[:, None].expand(-1, width)).apply(pool)


def turn_down(G_B: Tensor, n: int) -> Tensor:
    """``I + V diag((alpha - 1) / S^2) V^T B^T B (M, P, P)``, with which ``B`` is multiplied from the right.

    Args:
        G_B: ``B^T B (M, P, P)`` of the units of all adapters. n: Number of adapters.
    """
    squares, V = torch.linalg.eigh(G_B)
    squares = squares.clamp_min(0)
    share = squares / gram.nonzero_or_one(squares.sum(1, keepdim=True))
    alpha = 1 / (1 + (n - 1) * share)
    keep = squares > 1e-12 * squares[:, -1:]
    inverse = torch.where(keep, (alpha - 1) / torch.where(keep, squares, 1), 0)
    return torch.eye(G_B.shape[1], dtype=V.dtype) + (V * inverse[:, None, :]) @ V.mT @ G_B
