"""Clustering of points that are given by their Gram matrices ``G (M, P, P)`` float64, batched over modules.

The mean of a cluster is a linear combination of its members, so `G` holds every distance that k-means needs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def kmeans(G: Tensor, k: Tensor, *, starts: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cluster points: Ward's tree cut at `k`, then Lloyd's iterations; the best of several starts.

    Minimises the same objective as scikit-learn's ``KMeans``. The partition depends neither on the order of the
    points (unless several have the same norm) nor on the other modules of the batch.

    Args:
        G: ``(M, P, P)`` float64 Gram matrices of the points.
        k: ``(M,)`` long, clusters per module, ``1 .. P``.
        starts: Number of k-means++ starts beside Ward's.
        seed: Random seed of the k-means++ starts.

    Returns:
        ``labels (M, P)`` long, numbered by first member; ``inertia (M,)`` float64.
    """
    order = G.diagonal(dim1=1, dim2=2).sort(dim=1, descending=True, stable=True).indices
    G = G.gather(1, order[:, :, None].expand_as(G)).gather(2, order[:, None, :].expand_as(G))
    labels, inertia = lloyd(G, ward(G, k), k)
    for start in range(starts):
        generator = torch.Generator("cpu").manual_seed(seed + start)
        other, other_inertia = lloyd(G, plus_plus(G, k, generator), k)
        better = other_inertia < inertia
        labels = torch.where(better[:, None], other, labels)
        inertia = torch.where(better, other_inertia, inertia)
    return renumber(torch.empty_like(labels).scatter_(1, order, labels)), inertia


def ward(G: Tensor, k: Tensor) -> Tensor:
    """Ward's agglomerative clustering: always merge the two clusters that raise the inertia least.

    Args:
        G: ``(M, P, P)`` Gram matrices. k: ``(M,)`` long, number of clusters, ``1 .. P``.

    Returns:
        ``(M, P)`` long labels ``0 .. k-1``, numbered by each cluster's first unit; every cluster has a member.

    Raises:
        LinAlgError: The distances are not finite.
    """
    M, P, _ = G.shape
    if not bool((k < P).any()):
        return torch.arange(P, device=G.device).repeat(M, 1)
    from scipy.cluster.hierarchy import linkage  # imported here: it takes a quarter of a second

    i, j = torch.triu_indices(P, P, 1, device=G.device)
    square = G.diagonal(dim1=1, dim2=2)
    pair_distances = _squared_distance(square[:, i], square[:, j], G.flatten(1)[:, i * P + j]).sqrt()
    if not bool(torch.isfinite(pair_distances).all()):
        raise torch.linalg.LinAlgError("the distances between units are not finite")  # pyright: ignore[reportPrivateImportUsage]
    labels: list[list[int]] = []
    for pairs, clusters in zip(pair_distances.cpu().numpy(), k.tolist(), strict=True):
        tree = linkage(pairs, "ward")[: P - clusters, :2].astype(int).tolist()  # pairs to merge, the nearest first
        labels.append(_last_clusters(tree, P))
    return renumber(torch.tensor(labels, device=G.device))


def _last_clusters(tree: list[list[int]], P: int) -> list[int]:
    """For each of `P` points the last cluster it went into, where row t of `tree` merges two into cluster ``P + t``."""
    last = list(range(P + len(tree)))
    for t in reversed(range(len(tree))):
        for part in tree[t]:
            last[part] = last[P + t]
    return last[:P]


def plus_plus(G: Tensor, k: Tensor, generator: torch.Generator) -> Tensor:
    """k-means++ start: centres drawn one by one with probability proportional to the squared distance.

    All modules use the same random numbers, so that none depends on the other modules of the batch.

    Args:
        G: ``(M, P, P)``. k: ``(M,)`` long. generator: A CPU generator, so that every device draws the same numbers.

    Returns:
        ``(M, P)`` long labels of the nearest centre, ``0 .. k-1``; a cluster may be empty where points coincide.
    """
    M, P, _ = G.shape
    rows = torch.arange(M, device=G.device)
    square = G.diagonal(dim1=1, dim2=2)
    nearest = torch.full((M, P), torch.inf, dtype=G.dtype, device=G.device)
    labels = torch.zeros(M, P, dtype=torch.long, device=G.device)
    for step in range(int(k.max())):
        chance = torch.where(nearest.isinf(), 1.0, nearest) if step == 0 else nearest
        total = chance.cumsum(1)
        draw = torch.rand(1, generator=generator, dtype=torch.float64, device="cpu").to(G) * total[:, -1:]
        centre = (total < draw).sum(1).clamp_max(P - 1)
        to_centre = _squared_distance(square, square[rows, centre, None], G[rows, centre])
        to_centre = torch.where((k > step)[:, None], to_centre, torch.inf)
        labels = torch.where(to_centre < nearest, step, labels)
        nearest = torch.minimum(nearest, to_centre)
    return labels


def lloyd(G: Tensor, labels: Tensor, k: Tensor, max_steps: int = 100) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations until no unit moves.

    ``|x_p - mean_c|^2 = G_pp - 2/n sum_j G_pj + 1/n^2 sum_ij G_ij`` over the members i, j of c. A unit stays where
    it is on a tie; a cluster that becomes empty is refilled with the unit farthest from its centre.

    Args:
        G: ``(M, P, P)``. labels: ``(M, P)`` long start. k: ``(M,)`` long.

    Returns:
        ``labels (M, P)`` and ``inertia (M,)``, the summed squared distance to the centres.
    """
    square = G.diagonal(dim1=1, dim2=2)
    in_use = torch.arange(int(k.max()), device=G.device) < k[:, None]  # (M, k)
    for _ in range(max_steps):
        labels = _refill(G, labels, in_use)
        distance = _squared_to_centres(G, labels, in_use)
        current = distance.gather(2, labels[:, :, None])[:, :, 0]
        best, nearest = distance.min(2)
        moved = best < current - 1e-12 * square.amax(1, keepdim=True)
        if not bool(moved.any()):
            return labels, current.sum(1)
        labels = torch.where(moved, nearest, labels)
    labels = _refill(G, labels, in_use)
    return labels, _squared_to_own_centre(G, labels, in_use).sum(1)


def _squared_to_centres(G: Tensor, labels: Tensor, in_use: Tensor) -> Tensor:
    """Squared distance of every unit to every cluster's mean, ``(M, P, k)``; infinite for empty clusters."""
    Z = torch.nn.functional.one_hot(labels, in_use.shape[1]).to(G)  # (M, P, k)
    n = Z.sum(1)
    GZ = (G @ Z) / n.clamp_min(1)[:, None, :]
    mean_square = (Z * GZ).sum(1) / n.clamp_min(1)
    distance = G.diagonal(dim1=1, dim2=2)[:, :, None] - 2 * GZ + mean_square[:, None, :]
    return distance.clamp_min(0).masked_fill((n == 0)[:, None, :], torch.inf)


def _squared_to_own_centre(G: Tensor, labels: Tensor, in_use: Tensor) -> Tensor:
    """Squared distance of every unit to the mean of its own cluster, ``(M, P)``."""
    return _squared_to_centres(G, labels, in_use).gather(2, labels[:, :, None])[:, :, 0]


def _refill(G: Tensor, labels: Tensor, in_use: Tensor) -> Tensor:
    """Give every empty cluster the unit that is farthest from its own centre, as scikit-learn does."""
    while True:
        count = torch.nn.functional.one_hot(labels, in_use.shape[1]).sum(1)
        empty = (count == 0) & in_use
        m = empty.any(1).nonzero()[:, 0]
        if len(m) == 0:
            return labels
        shared = count[m].gather(1, labels[m]) > 1  # never empty one cluster to fill another
        unit = torch.where(shared, _squared_to_own_centre(G[m], labels[m], in_use[m]), -1.0).argmax(1)
        labels = labels.clone()
        labels[m, unit] = empty[m].int().argmax(1)


def renumber(labels: Tensor) -> Tensor:
    """Number clusters by their first unit, so that equal partitions have equal labels. ``(M, P)`` long."""
    P = labels.shape[1]
    unit = torch.arange(P, device=labels.device).expand_as(labels)
    first = labels.new_full((len(labels), int(labels.max()) + 1), P).scatter_reduce_(1, labels, unit, "amin")
    return first.argsort(1).argsort(1).gather(1, labels)


def cluster_sizes(labels: Tensor, k: int) -> Tensor:
    """Number of units in each of `k` clusters, ``(M, k)`` long, for ``labels (M, P)`` long."""
    return labels.new_zeros(len(labels), k).scatter_add_(1, labels, torch.ones_like(labels))


def squared_distances(G: Tensor) -> Tensor:
    """``|x_i - x_j|^2 (M, P, P)`` of points with Gram matrix `G`."""
    square = G.diagonal(dim1=1, dim2=2)
    return _squared_distance(square[:, :, None], square[:, None, :], G)


def _squared_distance(ii: Tensor, jj: Tensor, ij: Tensor) -> Tensor:
    """``|x_i - x_j|^2`` from the products of the two points with themselves and with each other."""
    return (ii + jj - 2 * ij).clamp_min(0)
