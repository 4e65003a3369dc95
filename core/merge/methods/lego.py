"""LoRA-LEGO: cluster the pooled units, let each cluster become one unit of the merged LoRA.

Source: arXiv:2409.16167. Where the paper leaves a choice open, `Lego`'s arguments name it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import gram
from ..pool import LinearCombination, Merged, Pool
from ..rank import Rank
from ..statistics import Statistics
from .calibrated import calibrate_units

Geometry = Literal["rank-one", "paper"]
Norm = Literal["inf", "l2"]
Centroid = Literal["sum", "mean"]


@dataclass(frozen=True)
class Lego:
    """LEGO merge.

    Args:
        rank: Number of clusters k, the merged rank.
        geometry: ``"paper"`` clusters ``x_j = concat(a_j, b_j)`` of the factors as they are. ``"rank-one"`` first
            brings every adapter to its balanced SVD form and compares units as matrices ``b_j a_j^T``, which no
            longer depends on sign, scale or rotation of the factors.
        centroid: ``"mean"`` of a cluster's members (the paper) or their ``"sum"``, which keeps what many small
            units add up to. ``None``: the geometry's own, mean for ``"paper"`` and sum for ``"rank-one"``.
        parameter_reweight: Rescale each centroid to the mean norm of its members (counters norm decay). ``None``: on
            for ``"paper"``, off for ``"rank-one"``.
        output_reweight: Multiply the merged B by ``sqrt(r / k)``, r the mean rank ``P / N`` of the inputs (counters
            variance growth). ``None``: on for ``"paper"``, off for ``"rank-one"``.
        norm: Which norm parameter reweighting compares: of the vector x_j in the paper's geometry, of the matrix
            ``b_j a_j^T`` (largest entry, Frobenius) in the other.
        starts: k-means++ starts beside Ward's tree. One was better in none of 1,400 layers of rank-one units, in the
            paper's geometry in up to 7 of 100, by at most 1 %.
        seed: Of the k-means++ draws.
        statistics: With these, the units are first made to respond to what their LoRA is for and to leave the rest of
            the model alone, as in `Calibrated`. Their positions refer to the merge's list of adapters.
    """

    rank: Rank
    geometry: Geometry = "rank-one"
    centroid: Centroid | None = None
    parameter_reweight: bool | None = None
    output_reweight: bool | None = None
    norm: Norm = "inf"
    starts: int = 0
    seed: int = 0
    statistics: Statistics | None = None

    def __call__(self, pool: Pool) -> Merged:
        if self.statistics is None:
            return self._merge(pool)
        responsive, unmeasured = calibrate_units(pool, self.statistics)
        remarks = dict.fromkeys(unmeasured, "have no statistics: their units were merged as they are")
        return replace(self._merge(responsive), remarks=remarks)

    def _merge(self, pool: Pool) -> Merged:
        published = self.geometry == "paper"
        k = self.rank.resolve(pool)
        gauge = fold_scales(pool) if published else balance_units(pool)
        # units in the chosen gauge: A_j rows of gauge.R_A @ A, B_j columns of B @ gauge.R_B
        G_A, G_B = transform_gram(pool, pool.G_A, gauge.R_A), transform_gram(pool, pool.G_B, gauge.R_B.mT)
        labels, _ = gram.kmeans(G_A + G_B if published else G_A * G_B, k, starts=self.starts, seed=self.seed)

        Z = torch.nn.functional.one_hot(labels, int(k.max())).to(G_A)  # (M, P, k)
        n = Z.sum(1).clamp_min(1)  # (M, k)
        mean = Z / n[:, None, :]
        a, b = (mean, mean) if published else gram.best_rank_one(G_A, G_B, labels, Z.shape[2])
        merged = LinearCombination(a.mT @ gauge.R_A, gauge.R_B @ b, k, labels)

        size = torch.ones_like(n)
        if self.parameter_reweight if self.parameter_reweight is not None else published:
            size = size * self._norm_ratio(pool, gauge, merged, mean)
        if (self.centroid or ("mean" if published else "sum")) == "sum":
            size = size * n
        root = size.sqrt()  # on both factors alike
        R_A, R_B = merged.R_A * root[:, :, None], merged.R_B * root[:, None, :]
        if self.output_reweight if self.output_reweight is not None else published:
            r = pool.size / len(pool.ranks)
            R_B = R_B * (r / k.to(R_B)).sqrt()[:, None, None]
        return LinearCombination(R_A, R_B, k, labels).apply(pool)

    def _norm_ratio(self, pool: Pool, gauge: LinearCombination, merged: LinearCombination, mean: Tensor) -> Tensor:
        """Mean norm of a cluster's members over the norm of its centroid, per unit matrix: ``(M, k)``."""
        members = (unit_norms(*gauge.units(pool), self.geometry, self.norm)[:, None] @ mean)[:, 0]
        centroids = unit_norms(*merged.units(pool), self.geometry, self.norm)
        ratio = torch.where(centroids > 0, members / gram.nonzero_or_one(centroids), 1)
        return ratio.square() if self.geometry == "paper" else ratio  # x scales by sqrt(size), b a^T by size


def fold_scales(pool: Pool) -> LinearCombination:
    """Step 1 of the paper: ``A <- sqrt|c| A``, ``B <- sign(c) sqrt|c| B``. BatchRunner unit carries its true size."""
    root = pool.c.abs().sqrt()
    ranks = torch.full((pool.batch,), pool.size)
    return LinearCombination(torch.diag_embed(root), torch.diag_embed(root * pool.c.sign()), ranks)


def balance_units(pool: Pool) -> LinearCombination:
    """Every adapter in balanced SVD form, ``A_i = sqrt(S) V^T``, ``B_i = U sqrt(S)``; weight and scale included."""
    R_A, R_B = torch.zeros_like(pool.G_A), torch.zeros_like(pool.G_B)
    for at, svd, weight in zip(pool.spans, pool.own, pool.weights.mT[:, :, None, None], strict=True):
        root = weight.abs().sqrt()
        R_A[:, at, at], R_B[:, at, at] = root * svd.R_A, root * weight.sign() * svd.R_B
    return LinearCombination(R_A, R_B, torch.full((pool.batch,), pool.size))


def transform_gram(pool: Pool, G: Tensor, R: Tensor) -> Tensor:
    """``R G R^T`` for an `R` that mixes only units of the same adapter."""
    blocks = [R[:, at, at] for at in pool.spans]
    G = torch.cat([block @ part for block, part in zip(blocks, pool.split(G, 1), strict=True)], 1)
    return torch.cat([part @ block.mT for block, part in zip(blocks, pool.split(G, 2), strict=True)], 2)


def unit_norms(A: Tensor, B: Tensor, geometry: Geometry, norm: Norm) -> Tensor:
    """Norm of every unit, ``(M, P)`` float64: of ``concat(a, b)`` ("paper") or of the matrix ``b a^T`` ("rank-one").

    Args:
        A: ``(M, P, d_in)``. B: ``(M, d_out, P)``.
    """
    if norm == "inf":
        # max and min each read the factor once; abs() would write a copy of it
        a = torch.maximum(A.amax(2), -A.amin(2)).double()
        b = torch.maximum(B.amax(1), -B.amin(1)).double()
        return torch.maximum(a, b) if geometry == "paper" else a * b
    a, b = A.double().square().sum(2), B.double().square().sum(1)
    return (a + b if geometry == "paper" else a * b).sqrt()
