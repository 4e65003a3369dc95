"""Truncated SVD of the summed deltas: the best low-rank approximation of the plain sum."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..merged import LinearCombination, Merged
from ..pool import Pool
from ..rank import RankField, rank_field


@dataclass(frozen=True)
class SVD:
    """The rank-`k` matrix nearest to ``sum_i w_i scale_i B_i A_i`` in the Frobenius norm.

    It is exact, and computed in the space of the units (`gram.svd`): the dense ``(d_out, d_in)`` sum is never formed.

    Args:
        rank: Merged rank: a number, or a text such as "1.5x", "95%"; default the inputs' mean rank.

    Source: Eckart-Young; PEFT and kohya form the dense sum and call it ``svd``.
    """

    rank: RankField = rank_field()

    def __call__(self, pool: Pool) -> Merged:
        k = self.rank.resolve(pool).clamp_max(pool.max_rank)
        keep = torch.arange(int(k.max()), device=k.device) < k[:, None]  # (M, k): the k largest singular values
        svd, width = pool.svd, keep.shape[1]
        R_A, R_B = svd.R_A[:, :width] * keep[:, :, None], svd.R_B[:, :, :width] * keep[:, None]
        return LinearCombination(R_A, R_B, k).apply(pool)
