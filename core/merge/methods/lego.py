"""LoRA-LEGO: cluster the pooled units, and make each cluster one unit of the merged LoRA.

The steps, in the order of the paper:

1. Fold weight and scale into both factors, so that ``delta_i = B_i A_i`` and every unit has its true size.
2. Pool all units of a module over the adapters.
3. Cluster the pool into k clusters by k-means; k is the merged rank.
4. Each cluster's centroid becomes one unit. *Parameter reweighting* rescales it to the mean norm of its members,
   against norm decay.
5. *Output reweighting* multiplies the merged ``B`` by ``sqrt(r / k)``, against variance growth.

`merge_paper` is these steps as published. `merge_rank_one` is the same in a geometry that does not depend on how a
delta is factorised. Both work on Gram matrices: a centroid is a linear combination of its members.

Source: arXiv:2409.16167. Where the paper leaves a choice open, an argument of `Lego` names it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import gram
from ..clustering import cluster_sizes, kmeans
from ..merged import LinearCombination, Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from ..statistics import Statistics
from .calibrated import calibrate_units
from .concat import fold_scales

Geometry = Literal["rank-one", "paper"]
Norm = Literal["inf", "l2"]
Centroid = Literal["sum", "mean"]


@dataclass(frozen=True)
class Lego:
    """LEGO merge.

    Args:
        rank: Number of clusters k, the merged rank.
        geometry: ``"paper"`` clusters ``x_j = concat(a_j, b_j)`` of the factors as stored. ``"rank-one"`` first
            brings every adapter to its balanced SVD basis and compares units as matrices ``b_j a_j^T``, which no
            longer depends on sign, scale or rotation of the factors.
        centroid: ``"mean"`` of a cluster's members (the paper) or their ``"sum"``, which keeps what many small
            units add up to. ``None``: mean for ``"paper"``, sum for ``"rank-one"``.
        parameter_reweight: Rescale each centroid to the mean norm of its members (against norm decay). ``None``: on
            for ``"paper"``, off for ``"rank-one"``.
        output_reweight: Multiply the merged B by ``sqrt(r / k)``, r the mean rank ``P / N`` of the inputs (against
            variance growth). ``None``: on for ``"paper"``, off for ``"rank-one"``.
        norm: Norm that parameter reweighting compares: of the vector x_j in the paper's geometry, of the matrix
            ``b_j a_j^T`` (largest entry, Frobenius) in the other.
        starts: Number of k-means++ starts beside Ward's tree. One was better in none of 1,400 layers of rank-one
            units, in the paper's geometry in up to 7 of 100, by at most 1 %.
        seed: Random seed of the k-means++ starts.
        statistics: If given, units are first made to respond to their LoRA's concept and to leave the rest of the
            model alone, as in `Calibrated`. Their positions refer to the merge's list of adapters.
    """

    rank: RankField = rank_field()
    geometry: Geometry = "rank-one"
    centroid: Centroid | None = None
    parameter_reweight: bool | None = None
    output_reweight: bool | None = None
    norm: Norm = "inf"
    starts: int = 0
    seed: int = 0
    statistics: Statistics | None = None

    def __call__(self, pool: Pool) -> Merged:
        merge = merge_paper if self.geometry == "paper" else merge_rank_one
        if self.statistics is None:
            return merge(pool, self).apply(pool)
        responsive, unmeasured = calibrate_units(pool, self.statistics)
        merged = merge(responsive, self).apply(responsive)
        return replace(merged, remarks=dict.fromkeys(unmeasured, "have no statistics: their units were not calibrated"))


def merge_paper(pool: Pool, lego: Lego) -> LinearCombination:
    """LEGO as published: units are vectors ``x_j = concat(a_j, b_j)``."""
    # Step 1. A <- sqrt|c| A, B <- sign(c) sqrt|c| B, with c = weight * scale
    units = fold_scales(pool)
    # Step 2. The pooled units' Gram matrix <x_i, x_j> = A A^T + B^T B
    G_A, G_B = transform_gram(pool, pool.G_A, units.R_A), transform_gram(pool, pool.G_B, units.R_B.mT)
    # Step 3. k-means
    k = lego.rank.resolve(pool)
    labels, _ = kmeans(G_A + G_B, k, starts=lego.starts, seed=lego.seed)
    # Step 4. The centroid is the mean of the members, rescaled to their mean norm (or n times the mean: their sum)
    n = cluster_sizes(labels, int(k.max()))
    mean = cluster_means(labels, n)
    merged = LinearCombination(mean.mT @ units.R_A, units.R_B @ mean, k, labels)
    size = torch.ones_like(n, dtype=torch.float64)
    if _or_default(lego.parameter_reweight, True):
        size = size * norm_ratio(pool, units, merged, labels, "paper", lego.norm).square()  # |x| grows as sqrt(size)
    if (lego.centroid or "mean") == "sum":
        size = size * n
    merged = scale_units(merged, size)
    # Step 5. B <- sqrt(r / k) B
    if _or_default(lego.output_reweight, True):
        merged = reweight_output(pool, merged)
    return merged


def merge_rank_one(pool: Pool, lego: Lego) -> LinearCombination:
    """LEGO on rank-one matrices: units are ``b_j a_j^T``, of adapters in their balanced SVD basis."""
    # Step 1. A_i <- sqrt(S_i) V_i^T, B_i <- U_i sqrt(S_i), with delta_i = U_i S_i V_i^T
    units = balance_units(pool)
    # Step 2. The pooled units' Gram matrix <b_i a_i^T, b_j a_j^T> = (A A^T) * (B^T B), elementwise
    G_A, G_B = transform_gram(pool, pool.G_A, units.R_A), transform_gram(pool, pool.G_B, units.R_B.mT)
    return cluster_rank_one(pool, lego, units, G_A, G_B)


def cluster_rank_one(pool: Pool, lego: Lego, units: LinearCombination, G_A: Tensor, G_B: Tensor) -> LinearCombination:
    """Steps 3 to 5 for rank-one matrices.

    Args:
        pool: The pool. lego: The hyperparameters.
        units: The units to cluster. G_A: ``A A^T (M, P, P)`` of these units. G_B: ``B^T B``.
    """
    # Step 3. k-means
    k = lego.rank.resolve(pool)
    labels, _ = kmeans(G_A * G_B, k, starts=lego.starts, seed=lego.seed)
    # Step 4. The centroid is the best rank-one approximation of the members' mean, times n: of their sum
    n = cluster_sizes(labels, int(k.max()))
    alpha, beta = gram.best_rank_one(G_A, G_B, labels, int(k.max()))
    merged = LinearCombination(alpha.mT @ units.R_A, units.R_B @ beta, k, labels)
    size = torch.ones_like(n, dtype=torch.float64)
    if _or_default(lego.parameter_reweight, False):
        size = size * norm_ratio(pool, units, merged, labels, "rank-one", lego.norm)  # |b a^T| grows as size
    if (lego.centroid or "sum") == "sum":
        size = size * n
    merged = scale_units(merged, size)
    # Step 5. B <- sqrt(r / k) B
    if _or_default(lego.output_reweight, False):
        merged = reweight_output(pool, merged)
    return merged


def _or_default(value: bool | None, default: bool) -> bool:
    return default if value is None else value


def balance_units(pool: Pool) -> LinearCombination:
    """Every adapter in its balanced SVD basis: ``A_i = sqrt(S) V^T``, ``B_i = U sqrt(S)``; weight and scale included.

    The units of a file are not a property of its delta: ``(R A, B R^-1)`` is the same delta for any invertible `R`,
    and two trainings start from different random `A`. Units of two adapters only become comparable in a basis that
    the delta itself defines. The SVD is one, unique where the singular values differ.
    """
    R_A, R_B = torch.zeros_like(pool.G_A), torch.zeros_like(pool.G_B)
    for span, svd, weight in zip(pool.spans, pool.adapter_svds, pool.weights.mT[:, :, None, None], strict=True):
        root = weight.abs().sqrt()
        R_A[:, span, span], R_B[:, span, span] = root * svd.R_A, root * weight.sign() * svd.R_B
    return LinearCombination(R_A, R_B, torch.full((pool.batch,), pool.size))


def transform_gram(pool: Pool, G: Tensor, R: Tensor) -> Tensor:
    """``R G R^T`` for an ``R (M, P, P)`` that combines only units of the same adapter."""
    blocks = [R[:, span, span] for span in pool.spans]
    G = torch.cat([block @ part for block, part in zip(blocks, pool.split(G, 1), strict=True)], 1)
    return torch.cat([part @ block.mT for block, part in zip(blocks, pool.split(G, 2), strict=True)], 2)


def cluster_means(labels: Tensor, n: Tensor) -> Tensor:
    """Coefficients ``(M, P, k)`` float64 of every cluster's mean, for clusters of ``n (M, k)`` units."""
    return torch.nn.functional.one_hot(labels, n.shape[1]) / n.clamp_min(1).double()[:, None, :]


def norm_ratio(
    pool: Pool, units: LinearCombination, merged: LinearCombination, labels: Tensor, geometry: Geometry, norm: Norm
) -> Tensor:
    """Mean norm of each cluster's members over the norm of its centroid, ``(M, k)``; 1 where the centroid is zero."""
    mean = cluster_means(labels, cluster_sizes(labels, merged.R_A.shape[1]))
    members = (unit_norms(*units.units(pool), geometry, norm)[:, None] @ mean)[:, 0]
    centroids = unit_norms(*merged.units(pool), geometry, norm)
    return torch.where(centroids > 0, members / gram.nonzero_or_one(centroids), 1)


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


def scale_units(merged: LinearCombination, size: Tensor) -> LinearCombination:
    """Multiply every merged ``b a^T`` by its ``size (M, k)``, half of it (the square root) on each factor."""
    root = size.sqrt()
    return replace(merged, R_A=merged.R_A * root[:, :, None], R_B=merged.R_B * root[:, None, :])


def reweight_output(pool: Pool, merged: LinearCombination) -> LinearCombination:
    """Multiply the merged ``B`` by ``sqrt(r / k)``, r the mean rank ``P / N`` of the inputs."""
    r = pool.size / len(pool.ranks)
    return replace(merged, R_B=merged.R_B * (r / merged.ranks.to(merged.R_B)).sqrt()[:, None, None])
