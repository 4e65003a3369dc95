"""NP-LoRA: protect one LoRA by projecting the others away from its input directions."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...errors import MergeError
from ..merged import Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from .svd import SVD


@dataclass(frozen=True)
class NP:
    """Soft null space projection, then the best rank-k approximation of the sum.

        W = delta_p + sum_{i != p} delta_i (I - mu / (1 + mu) V V^T)

    The columns of ``V`` are the right singular vectors of the protected ``delta_p``: the other LoRAs lose the share
    ``mu / (1 + mu)`` of what they do to its input directions. ``mu = 0`` is the plain sum, a large `mu` the hard
    projection. The paper merges a style (protected) with a subject; here every LoRA but the protected one is projected.

    Args:
        rank: Merged rank; a share of the energy refers to `W`.
        protect: Number of the protected LoRA in the merge's list, from 1.
        mu: Strength of the projection, at least 0.

    Source: NP-LoRA, arXiv:2511.11051.
    """

    rank: RankField = rank_field()
    protect: int = 1
    mu: float = 1.0

    def __post_init__(self) -> None:
        if not self.mu >= 0 or self.protect < 1:
            raise MergeError(
                "A setting of NP-LoRA is out of range.",
                expected="mu of 0 or more, protect of 1 or more",
                found=f"mu {self.mu:g}, protect {self.protect}",
            )

    def __call__(self, pool: Pool) -> Merged:
        if self.protect - 1 not in pool.adapters:  # a module that the protected LoRA does not have
            return SVD(self.rank)(pool)
        p = pool.adapters.index(self.protect - 1)
        at, svd = pool.spans[p], pool.adapter_svds[p]
        # sqrt(S) V^T = R_A A_p, so V V^T = A_p^T N A_p with N = R_A^T S^-1 R_A; directions that are noise are zero
        inverse = torch.where(svd.S > 0, 1 / torch.where(svd.S > 0, svd.S, 1), 0)
        N = svd.R_A.mT @ (inverse[:, :, None] * svd.R_A)
        removed = pool.G_A[:, :, at] @ N  # A_i V V^T = (A_i A_p^T N) A_p
        removed[:, at] = 0
        share = 1.0 if self.mu == float("inf") else self.mu / (1 + self.mu)
        A = pool.A.double()
        A = pool.c[:, :, None] * (A - share * (removed @ A[:, at]))
        return SVD(self.rank)(pool.with_units(A.to(pool.A), pool.B))
