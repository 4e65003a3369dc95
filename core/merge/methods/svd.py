"""Truncated SVD of the summed deltas: the best low-rank approximation of the plain sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pool import LinearCombination, Merged, Pool
from ..rank import MEAN_RANK, Rank


@dataclass(frozen=True)
class SVD:
    """The rank-`k` matrix nearest to ``sum_i w_i scale_i B_i A_i`` in the Frobenius norm.

    Exact, found in the space of the units (`gram.svd`); the dense ``(d_out, d_in)`` sum is never formed.

    Args:
        rank: The merged rank.

    Source: Eckart-Young; PEFT and kohya form the dense sum and call it ``svd``.
    """

    rank: Rank = MEAN_RANK

    def __call__(self, pool: Pool) -> Merged:
        k = self.rank.resolve(pool).clamp_max(pool.max_rank)
        keep = torch.arange(int(k.max()), device=k.device) < k[:, None]  # (M, k)
        svd, width = pool.svd, keep.shape[1]
        return LinearCombination(svd.R_A[:, :width] * keep[:, :, None], svd.R_B[:, :, :width] * keep[:, None], k).apply(
            pool
        )
