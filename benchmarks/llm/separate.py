"""LEGO on units that were separated by statistics guessed from the adapters' weights: no prompts and no model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from legomole.core.merge import gram
from legomole.core.merge.merged import LinearCombination, Merged
from legomole.core.merge.methods.lego import Lego, balance_units, cluster_rank_one
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import RankField, rank_field
from torch import Tensor

from .pico import turn_down

_RIDGE = 1e-3  # weight of the plain sum, relative to the mean eigenvalue of the statistics


@dataclass(frozen=True)
class SeparatedLego:
    """Separate the units' inputs (`separate`), turn down common outputs (Pico), then LEGO.

    Args:
        rank: Merged rank. base: Weight of the base model's inputs. outputs: Whether common outputs are turned down.
    """

    rank: RankField = rank_field()
    base: float = 1.0
    outputs: bool = True

    def __call__(self, pool: Pool) -> Merged:
        units = balance_units(pool)
        R_A, R_B = units.R_A @ separate(pool, self.base), units.R_B
        if self.outputs:
            R_B = R_B @ turn_down(R_B.mT @ pool.G_B @ R_B, len(pool.ranks))
        G_A, G_B = R_A @ pool.G_A @ R_A.mT, R_B.mT @ pool.G_B @ R_B
        for span in pool.spans:  # every adapter in its balanced SVD basis again
            ones = torch.ones_like(pool.c[:, span])
            svd = gram.svd(G_A[:, span, span], G_B[:, span, span], ones)
            R_A[:, span], R_B[:, :, span] = svd.R_A @ R_A[:, span], R_B[:, :, span] @ svd.R_B
        G_A, G_B = R_A @ pool.G_A @ R_A.mT, R_B.mT @ pool.G_B @ R_B
        units = LinearCombination(R_A, R_B, units.ranks)
        return cluster_rank_one(pool, Lego(self.rank), units, G_A, G_B).apply(pool)


def separate(pool: Pool, base: float) -> Tensor:
    """Mix the rows of `A` so that each adapter acts in the input directions that it changed most.

    An adapter changes a layer in the directions of the inputs that it was trained on, so ``delta_i^T delta_i`` stands
    for their second moments. With ``C_i = delta_i^T delta_i`` over its mean diagonal, the identity for the base model's
    inputs and ``tau`` a thousandth of the mean eigenvalue of the rest of ``G``, the rows become those of `Calibrated`,

        A_i (C_i + tau I) G^-1,  G = sum_i C_i + (base + tau) I.

    ``C_i`` has rank ``r_i``, hence no ``(d_in, d_in)`` matrix is needed: with ``C_i = A_i^T K_i A_i`` and ``K`` the
    block diagonal matrix of the ``K_i``,

        (blockdiag(A_i A_i^T) K + tau) (A A^T K + base + tau)^-1 A.

    Args:
        pool: The units. The user's weights do not count.
        base: Weight of the base model's inputs, above 0.

    Returns:
        ``(M, P, P)`` float64: the new rows are its product with the rows of the pool.

    Source: the proxy of WUDI-Merging (arXiv:2503.08099), in the objective of `Calibrated`.
    """
    other_adapter = pool.owner[:, None] != pool.owner
    d_in, n = pool.factors.shape[2], len(pool.ranks)
    member = torch.nn.functional.one_hot(pool.owner, n).to(pool.G_A)
    scaled = pool.scale[:, :, None] * pool.G_B.masked_fill(other_adapter, 0) * pool.scale[:, None, :]
    energy = (scaled * pool.G_A).sum(2) @ member  # |delta_i|^2, the trace of delta_i^T delta_i
    K = scaled * (d_in / gram.nonzero_or_one(energy.clamp_min(0)))[:, pool.owner][:, :, None]
    tau = _RIDGE * (n + base)
    own, whole = pool.G_A.masked_fill(other_adapter, 0) @ K, pool.G_A @ K
    own.diagonal(dim1=1, dim2=2).add_(tau)
    whole.diagonal(dim1=1, dim2=2).add_(base + tau)
    return torch.linalg.solve(whole, own, left=False)
