"""LoRA-LEGO: cluster the pooled units, let each cluster become one unit of the merged LoRA.

Source: arXiv:2409.16167. Where the paper leaves a choice open, `Lego`'s arguments name it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .. import gram
from ..pool import Merged, Mixing, Pool
from ..rank import Rank
from ..statistics import Statistics
from .calibrated import respond

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
        starts: k-means++ starts beside Ward's tree.
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
    starts: int = 1
    seed: int = 0
    statistics: Statistics | None = None

    def __call__(self, pool: Pool) -> Merged:
        if self.statistics is None:
            return self._merge(pool)
        responsive, unmeasured = respond(pool, self.statistics)
        remarks = dict.fromkeys(unmeasured, "have no statistics: their units were merged as they are")
        return replace(self._merge(responsive), remarks=remarks, mixing=None)  # it was one of other units

    def _merge(self, pool: Pool) -> Merged:
        published = self.geometry == "paper"
        k = self.rank.resolve(pool)
        gauge = folded(pool) if published else balanced(pool)
        # units in the chosen gauge: A_j rows of gauge.R_A @ A, B_j columns of B @ gauge.R_B
        G_A, G_B = in_gauge(pool, pool.G_A, gauge.R_A), in_gauge(pool, pool.G_B, gauge.R_B.mT)
        labels, _ = gram.kmeans(G_A + G_B if published else G_A * G_B, k, starts=self.starts, seed=self.seed)

        Z = torch.nn.functional.one_hot(labels, int(k.max())).to(G_A)  # (M, P, k)
        n = Z.sum(1).clamp_min(1)  # (M, k)
        a, b = (Z / n[:, None, :], Z / n[:, None, :]) if published else best_rank_one(G_A, G_B, Z)
        merged = Mixing(a.mT @ gauge.R_A, gauge.R_B @ b, k, labels)

        size = torch.ones_like(n)
        if self.parameter_reweight if self.parameter_reweight is not None else published:
            size = size * self._norm_ratio(pool, gauge, merged, Z / n[:, None, :])
        if (self.centroid or ("mean" if published else "sum")) == "sum":
            size = size * n
        root = size.sqrt()  # on both factors alike
        R_A, R_B = merged.R_A * root[:, :, None], merged.R_B * root[:, None, :]
        if self.output_reweight if self.output_reweight is not None else published:
            r = pool.size / len(pool.ranks)
            R_B = R_B * (r / k.to(R_B)).sqrt()[:, None, None]
        return Mixing(R_A, R_B, k, labels).apply(pool)

    def _norm_ratio(self, pool: Pool, gauge: Mixing, merged: Mixing, mean: Tensor) -> Tensor:
        """Mean norm of a cluster's members over the norm of its centroid, per unit matrix: ``(M, k)``."""
        members = (unit_norms(gauge.apply(pool), self.geometry, self.norm)[:, None] @ mean)[:, 0]
        centroids = unit_norms(merged.apply(pool), self.geometry, self.norm)
        ratio = torch.where(centroids > 0, members / torch.where(centroids > 0, centroids, 1), 1)
        return ratio.square() if self.geometry == "paper" else ratio  # x scales by sqrt(size), b a^T by size


def folded(pool: Pool) -> Mixing:
    """Step 1 of the paper: ``A <- sqrt|c| A``, ``B <- sign(c) sqrt|c| B``. Each unit carries its true size."""
    root = pool.c.abs().sqrt()
    ranks = torch.full((pool.batch,), pool.size)
    return Mixing(torch.diag_embed(root), torch.diag_embed(root * pool.c.sign()), ranks)


def balanced(pool: Pool) -> Mixing:
    """Every adapter in balanced SVD form, ``A_i = sqrt(S) V^T``, ``B_i = U sqrt(S)``; weight and scale included."""
    R_A, R_B = torch.zeros_like(pool.G_A), torch.zeros_like(pool.G_B)
    for at in pool.spans:
        svd = gram.svd(pool.G_A[:, at, at], pool.G_B[:, at, at], pool.c[:, at])
        R_A[:, at, at], R_B[:, at, at] = svd.R_A, svd.R_B
    return Mixing(R_A, R_B, torch.full((pool.batch,), pool.size))


def in_gauge(pool: Pool, G: Tensor, R: Tensor) -> Tensor:
    """``R G R^T`` for an `R` that mixes only units of the same adapter."""
    blocks = [R[:, at, at] for at in pool.spans]
    G = torch.cat([block @ part for block, part in zip(blocks, pool.split(G, 1), strict=True)], 1)
    return torch.cat([part @ block.mT for block, part in zip(blocks, pool.split(G, 2), strict=True)], 2)


def best_rank_one(G_A: Tensor, G_B: Tensor, Z: Tensor, steps: int = 50) -> tuple[Tensor, Tensor]:
    """Best rank-one approximation of the mean ``1/n sum_j b_j a_j^T`` of every cluster.

    Power iteration on the members' coefficients, all clusters at once: for ``v = sum_j alpha_j a_j`` the image is
    ``sum_j <a_j, v> b_j``, that is ``beta = G_A alpha`` within the cluster, and back alike with ``G_B``. It starts
    from each cluster's largest member, so a single unit is returned as it is. Where the two largest singular values
    are close it may stop between their directions, which cost nearly the same.

    Args:
        G_A: ``(M, P, P)``. G_B: ``(M, P, P)``. Z: ``(M, P, k)`` one-hot membership.

    Returns:
        ``alpha, beta (M, P, k)``: the unit's row is ``alpha^T A``, its column ``B beta``, both of the same norm.
    """
    size = (G_A * G_B).diagonal(dim1=1, dim2=2).clamp_min(0)[:, :, None] * Z  # (M, P, k)
    start = torch.nn.functional.one_hot(size.argmax(1), Z.shape[1]).mT.to(Z) * Z
    # a unit is in one cluster, so one row (M, 1, P) has room for the coefficients of all clusters; a row, because
    # (1, P) @ (P, P) is read in order, several times as fast as (P, P) @ (P, 1)
    labels = Z.argmax(2)[:, None]
    same = labels == labels.mT
    G_A, G_B = G_A * same, G_B * same
    alpha, image_A = _unit(start.sum(2)[:, None], G_A, Z, labels)
    beta, image_B = alpha, alpha
    for _ in range(steps):
        beta, image_B = _unit(image_A, G_B, Z, labels)
        alpha, image_A = _unit(image_B, G_A, Z, labels)
    # sigma = u^T (1/n sum_j b_j a_j^T) v, shared evenly by the two factors
    sigma = (image_B * image_A) @ Z / Z.sum(1, keepdim=True).clamp_min(1)  # (M, 1, k)
    root = Z * sigma.clamp_min(0).sqrt()
    return alpha.mT * root, beta.mT * root


def _unit(x: Tensor, G: Tensor, Z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Every cluster's coefficients in `x` scaled to unit length under `G`, and ``x @ G``; zero stays zero."""
    xG = x @ G
    length = ((x * xG) @ Z).clamp_min(0).sqrt()  # (M, 1, k)
    inverse = torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0).gather(2, labels)
    return x * inverse, xG * inverse


def unit_norms(units: Merged, geometry: Geometry, norm: Norm) -> Tensor:
    """Norm of every unit, ``(M, P)`` float64: of ``concat(a, b)`` ("paper") or of the matrix ``b a^T`` ("rank-one")."""
    if norm == "inf":
        # max and min each read the factor once; abs() would write a copy of it
        a = torch.maximum(units.A.amax(2), -units.A.amin(2)).double()
        b = torch.maximum(units.B.amax(1), -units.B.amin(1)).double()
        return torch.maximum(a, b) if geometry == "paper" else a * b
    a, b = units.A.double().square().sum(2), units.B.double().square().sum(1)
    return (a + b if geometry == "paper" else a * b).sqrt()
