"""SSR-Merge: on each LoRA's own inputs, the merged LoRA comes as close to it as the LoRAs' rows allow."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import MergeError
from ...fields import REQUIRED
from ..merged import Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from ..statistics import ModuleStatistics, Statistics
from .calibrated import check_width
from .svd import SVD

_RIDGE = 1e-6  # weight of the plain sum relative to the mean eigenvalue of G, for units in the span of others


@dataclass(frozen=True)
class SSR:
    """Least squares over the LoRAs' own inputs, with the stacked rows ``A`` kept, then the best rank-k approximation.

    With inputs ``X_k`` of prompts for LoRA k, ``Z_k = A X_k`` and ``B = [B_1 .. B_N]``, scales included:

        B' = B Q G^-1,  Q = stack_k(A_k X_k Z_k^T),  G = sum_k Z_k Z_k^T

    ``B' A`` minimises ``sum_k |B' A X_k - B_k A_k X_k|^2``. In second moments ``C_k = X_k X_k^T / n``:
    ``G = A (sum_k C_k) A^T`` and the rows of ``Q`` that belong to LoRA k are ``A_k C_k A^T``. Every LoRA counts alike,
    however many inputs it has; a millionth of the mean eigenvalue of `G` ties units in the span of others to the plain
    sum. Prompts for several LoRAs or for none do not count: `Calibrated` has them too.

    The published merge keeps rank `P`: choose the rank "100%".

    A module without statistics gets the plain SVD of the sum, and a remark in the report.

    Args:
        rank: Merged rank; a share of the energy refers to ``B' A``.
        statistics: Measured moments; their positions refer to the merge's list of adapters (`Statistics.of`).

    Source: SSR-Merge, arXiv:2606.10617.
    """

    rank: RankField = rank_field()
    statistics: Statistics = REQUIRED

    def __post_init__(self) -> None:
        if self.statistics is REQUIRED:
            raise MergeError("SSR-Merge needs statistics.", remedy="measure them first, see docs/calibrated.md")

    def __call__(self, pool: Pool) -> Merged:
        A = pool.c[:, :, None].to(pool.A) * pool.A
        unmeasured: list[str] = []
        for m, name in enumerate(pool.names):
            moments = self.statistics.modules.get(name)
            if moments is None or not any(i in moments.own for i in pool.adapters):
                unmeasured.append(name)
            else:
                rows = pool.A[m].double()
                check_width(name, moments, rows)
                A[m] = (pool.c[m, :, None] * (_mixing(pool, moments, rows) @ rows)).to(A)
        merged = SVD(self.rank)(pool.with_units(A, pool.B))
        return replace(merged, remarks=dict.fromkeys(unmeasured, "have no statistics and got the plain SVD of the sum"))


def _mixing(pool: Pool, moments: ModuleStatistics, rows: Tensor) -> Tensor:
    """``Q G^-1 (P, P)`` for the rows ``A (P, d_in)`` float64."""
    space = moments.space(rows)
    G = torch.zeros(len(rows), len(rows), dtype=rows.dtype, device=rows.device)
    Q = torch.zeros_like(G)
    for k, C in moments.own.items():
        Z = space.gram(C.to(rows))  # A C_k A^T
        G += Z
        for at, adapter in zip(pool.spans, pool.adapters, strict=True):
            if adapter == k:
                Q[at] += Z[at]
    tau = float(_RIDGE * G.diagonal().mean()) or 1.0
    eye = tau * torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    return torch.linalg.solve(G + eye, Q + eye, left=False)
