"""Linear algebra and clustering that need only Gram matrices of the units, batched over modules.

With ``G_A = A A^T`` and ``G_B = B^T B`` (both ``(M, P, P)``, float64) a sum of deltas ``B diag(c) A`` can be
decomposed, and its units clustered, without ever touching the long dimensions again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import float32_is_exact
from .factors import Factors

# Relative size below which a direction is rounding noise of the float32 factors.
_TINY = 1e-7
# Sine of the angle between a unit and the others' span from which float32 tells them apart for certain.
_CLEAR = 1e-2


@dataclass(frozen=True, eq=False)
class GramSVD:
    """``B diag(c) A = (B R_B) (R_A A)`` in balanced SVD form: ``R_A A = sqrt(S) V^T``, ``B R_B = U sqrt(S)``.

    Args:
        S: ``(M, P)`` singular values, descending.
        R_A: ``(M, P, P)``. R_B: ``(M, P, P)``. Row (column) i belongs to ``S[:, i]``, zero where that is noise.
    """

    S: Tensor
    R_A: Tensor
    R_B: Tensor

    @property
    def nbytes(self) -> int:
        return self.S.nbytes + self.R_A.nbytes + self.R_B.nbytes


def svd(G_A: Tensor, G_B: Tensor, c: Tensor) -> GramSVD:
    """Exact SVD of ``B diag(c) A`` from Gram matrices.

    With ``G_A = L L^T`` the rows of ``L^-1 A`` are orthonormal, and the right singular vectors are the
    eigenvectors of ``L^T diag(c) G_B diag(c) L``, whose eigenvalues are the squared singular values.

    Args:
        G_A: ``(M, P, P)`` float64. G_B: ``(M, P, P)`` float64. c: ``(M, P)`` float64, any sign.
    """
    L, L_inverse = _root(G_A)
    cL = c[:, :, None] * L
    squares, V = torch.linalg.eigh(cL.mT @ G_B @ cL)
    S = squares.clamp_min(0).sqrt().flip(1)
    V = V.flip(2)
    keep = _TINY * S[:, :1].clamp_min(torch.finfo(S.dtype).tiny) < S
    S = torch.where(keep, S, 0)
    S_root = S.sqrt()
    S_inverse_root = torch.where(keep, 1 / torch.where(keep, S_root, 1), 0)
    return GramSVD(S, S_root[:, :, None] * (V.mT @ L_inverse), (cL @ V) * S_inverse_root[:, None, :])


def _root(G: Tensor) -> tuple[Tensor, Tensor]:
    """``L (M, P, P)`` with ``L L^T = G``, and its inverse, where directions of `G` that are noise are left out.

    Cholesky's `L`, several times as fast to find as eigenvectors, for matrices whose directions are all far from noise.
    """
    L, failed = torch.linalg.cholesky_ex(G)
    pivots = L.diagonal(dim1=1, dim2=2)
    sound = (failed == 0) & (pivots.amin(1) > 1000 * _TINY * pivots.amax(1))
    eye = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    L_inverse = torch.linalg.solve_triangular(torch.where(sound[:, None, None], L, eye), eye, upper=False)
    rest = (~sound).nonzero()[:, 0]
    if len(rest):
        values, vectors = torch.linalg.eigh(G[rest])
        keep = values > _TINY**2 * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
        root = torch.where(keep, values, 0).sqrt()
        inverse_root = torch.where(keep, 1 / torch.where(keep, root, 1), 0)
        L[rest], L_inverse[rest] = vectors * root[:, None, :], inverse_root[:, :, None] * vectors.mT
    return L, L_inverse


def best_rank_one(G_A: Tensor, G_B: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best rank-one approximation of the mean ``1/n sum_j b_j a_j^T`` of every cluster.

    Where the two largest singular values are close it may be between their directions, which costs nearly the same.

    Args:
        G_A: ``(M, P, P)``. G_B: ``(M, P, P)``. labels: ``(M, P)`` long, the cluster of each unit, below `k`.

    Returns:
        ``alpha, beta (M, P, k)``: the unit's row is ``alpha^T A``, its column ``B beta``, both of the same norm.
    """
    n = torch.nn.functional.one_hot(labels, k).sum(1)  # (M, k)
    order, start = labels.sort(dim=1, stable=True).indices, n.cumsum(1) - n
    alpha, beta = G_A.new_zeros(*labels.shape, k), G_A.new_zeros(*labels.shape, k)
    size = torch.where(n > 1, (n + 7) // 8 * 8, n)  # clusters of about the same size together, in matrices of that size
    for s in size[n > 0].unique().tolist():
        m, c = (size == s).nonzero(as_tuple=True)
        place = torch.arange(s, device=n.device)
        inside = place < n[m, c, None]  # (C, s)
        units = order[m[:, None], (start[m, c, None] + place).clamp_max(labels.shape[1] - 1)]
        both = (inside[:, :, None] & inside[:, None, :]).to(G_A)
        a, b = top_pair(*(_block(G, m, units).mul_(both) for G in (G_A, G_B)))
        which = inside.nonzero()[:, 0]
        at = (m[which], units[inside], c[which])
        root = n[m, c, None].to(G_A).rsqrt()  # of the mean, shared evenly by the two factors
        alpha[at], beta[at] = (a * root)[inside], (b * root)[inside]
    return alpha, beta


def _block(G: Tensor, m: Tensor, units: Tensor) -> Tensor:
    """Rows and columns `units (C, s)` of the matrices `m (C,)` of `G`: ``(C, s, s)``."""
    return G[m[:, None], units].gather(2, units[:, None, :].expand(-1, units.shape[1], -1))


def top_pair(G_A: Tensor, G_B: Tensor, steps: int = 64) -> tuple[Tensor, Tensor]:
    """Coefficients ``alpha, beta (C, s)`` of the best rank-one approximation ``(B beta)(alpha^T A)`` of ``B A``.

    Power iteration on the coefficients of `s` units: for ``v = A^T alpha`` the image is ``B A v``, that is
    ``beta = G_A alpha``, and back alike with ``G_B``. A small matrix ``T = G_A G_B`` is squared, which halves the
    `steps`, as long as that takes less time than they do.

    It starts from the largest unit, so a single unit is returned as it is. However large, a unit may be orthogonal to
    the leading direction, or nearly so. The eigenvalues of `T` are the squared singular values of ``B A``, and the
    traces of its powers bound the largest: where that leaves room for 5 % more energy, generic starts are tried too,
    and the best is taken if it has 1 % more.

    Args:
        G_A: ``(C, s, s)`` Gram matrices ``A A^T``, float64. G_B: ``(C, s, s)``, ``B^T B``.
    """
    sizes = (G_A * G_B).diagonal(dim1=1, dim2=2)
    (T, trace), s, power = _scaled(G_A @ G_B), G_A.shape[1], 1
    bound = trace.log()
    while steps > 1 and s < 12 * steps:
        T, trace = _scaled(T @ T)
        steps, power = steps // 2, 2 * power
        bound += trace.log() / power
    start = sizes.argmax(1)[:, None, None]
    alpha, beta, energy = _iterate(T.gather(1, start.expand(-1, 1, s)), T, steps, G_A, G_B)
    unsure = (energy[:, 0] < 0.95 * bound.exp()).nonzero()[:, 0]
    if len(unsure):
        rows = unsure if 4 * len(unsure) < len(T) else slice(None)  # copies only where they are few
        generic = _generic_starts(sizes[rows]) @ T[rows]
        others_alpha, others_beta, energies = _iterate(generic, T[rows], steps, G_A[rows], G_B[rows])
        most, best = energies.max(1, keepdim=True)
        better, best = (most > 1.01 * energy[rows])[:, :, None], best[:, :, None].expand(-1, 1, s)
        alpha[rows] = torch.where(better, others_alpha.gather(1, best), alpha[rows])
        beta[rows] = torch.where(better, others_beta.gather(1, best), beta[rows])
    return alpha[:, 0], beta[:, 0]


def _generic_starts(sizes: Tensor) -> Tensor:
    """Four random coefficients ``(C, 4, s)`` for each of `s` units, the same for every set of units.

    They are drawn for units in order of their ``sizes (C, s)``, so that the order in which units come does not matter.
    """
    s = sizes.shape[1]
    drawn = torch.randn(4, s, generator=torch.Generator("cpu").manual_seed(0), dtype=sizes.dtype, device="cpu")
    order = sizes.argsort(dim=1, descending=True, stable=True)[:, None, :].expand(-1, 4, -1)
    drawn = drawn.to(sizes.device).expand_as(order)
    return torch.empty_like(order, dtype=sizes.dtype).scatter_(2, order, drawn)


def _iterate(alpha: Tensor, T: Tensor, steps: int, G_A: Tensor, G_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Power iteration from rows ``alpha (C, q, s)``, the first step of which is done.

    Returns:
        ``alpha, beta (C, q, s)`` of equal norms, and ``(C, q)`` the energy ``sigma^2`` of each pair.
    """
    for _ in range(steps - 1):
        alpha = alpha / nonzero_or_one(alpha.abs().amax(2, keepdim=True)) @ T
    alpha, image_A = _unit(alpha, G_A)
    beta, image_B = _unit(image_A, G_B)
    sigma = (image_B * image_A).sum(2).clamp_min(0)  # u^T B A v
    root = sigma.sqrt()[:, :, None]
    return alpha * root, beta * root, sigma.square()


def _scaled(T: Tensor) -> tuple[Tensor, Tensor]:
    """`T`, in place, divided by its trace, and the trace ``(C,)``: the sum of the eigenvalues, all at least 0."""
    trace = T.diagonal(dim1=1, dim2=2).sum(1)
    T /= nonzero_or_one(trace)[:, None, None]
    return T, trace


def _unit(x: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``x (C, q, s)`` scaled to unit length under `G`, and ``x @ G``; zero stays zero."""
    xG = x @ G
    length = nonzero_or_one((x * xG).sum(2, keepdim=True).clamp_min(0).sqrt())
    return x / length, xG / length


def nonzero_or_one(x: Tensor) -> Tensor:
    """`x` with 1 in place of 0, to divide by; `x` is at least 0."""
    return torch.where(x > 0, x, 1)


def products(factors: Factors) -> tuple[Tensor, Tensor]:
    """``A A^T`` and ``B^T B``, ``(M, P, P)`` float64, in one pass over the factors.

    In general the products are float64, so that the square of a condition number does not reach the results. Of
    numbers stored in 16 bits float32 will do as long as no unit is nearly in the span of others: products with an
    error of about 1e-6 are the exact ones of factors that differ from these by ``1e-6 / 2 _CLEAR``, a fraction of what
    the file rounds (2^-12 in float16).
    """
    if factors.short and factors.device.type == "cpu" and float32_is_exact(factors.device):
        G_A, G_B = _products(factors, torch.float32)
        unclear = (~(_clear(G_A) & _clear(G_B))).nonzero()[:, 0].tolist()
        if unclear:
            G_A[unclear], G_B[unclear] = _products(factors.only(unclear), torch.float64)
        return G_A, G_B
    return _products(factors, torch.float64)


def _products(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    M, P, _, _ = factors.shape
    G_A, G_B = torch.empty(2, M, P, P, dtype=torch.float64, device=factors.device)
    for at, A, B in factors.pieces():
        product(A, dtype, G_A[at])
        product(B.mT, dtype, G_B[at])
    return G_A, G_B


def _clear(G: Tensor) -> Tensor:
    """``(M,)`` bool: whether products in float32 tell all units apart, and none is too small or large for it."""
    L, failed = torch.linalg.cholesky_ex(G)
    square = G.diagonal(dim1=1, dim2=2)
    sine = L.diagonal(dim1=1, dim2=2) > _CLEAR * square.sqrt()
    limits = torch.finfo(torch.float32)
    return (failed == 0) & (sine & (square > limits.tiny / limits.eps)).all(1)


def product(X: Tensor, dtype: torch.dtype, out: Tensor, *, rows: int = 256, part: int = 64) -> None:
    """Put ``X X^T``, multiplied in `dtype`, into ``out (M, P, P)``; most of the upper half is mirrored.

    Args:
        X: ``(M, P, d)``. rows: Held in `dtype` beside `X` at a time. part: Of these multiplied at a time.
    """
    for start in range(0, X.shape[1], rows):
        some = X[:, start : start + rows].to(dtype)
        for other in range(0, start, rows):
            _put(out, start, other, some @ X[:, other : other + rows].to(dtype).mT)
        for i in range(0, some.shape[1], part):
            _put(out, start + i, start, some[:, i : i + part] @ some[:, : i + part].mT)


def _put(G: Tensor, row: int, column: int, block: Tensor) -> None:
    """Write a block of a symmetric matrix, and the mirror image of its columns before `row`."""
    down, across = slice(row, row + block.shape[1]), slice(column, column + block.shape[2])
    G[:, down, across] = block
    left = min(row - column, block.shape[2])
    G[:, column : column + left, down] = block[:, :, :left].mT


def distances(G: Tensor) -> Tensor:
    """Squared distances ``|x_i - x_j|^2 (M, P, P)`` of points with Gram matrix `G`."""
    square = G.diagonal(dim1=1, dim2=2)
    return _distance(square[:, :, None], square[:, None, :], G)


def _distance(ii: Tensor, jj: Tensor, ij: Tensor) -> Tensor:
    """``|x_i - x_j|^2`` from the products of the two points with themselves and with each other."""
    return (ii + jj - 2 * ij).clamp_min(0)


def ward(G: Tensor, k: Tensor) -> Tensor:
    """Ward's agglomerative clustering: always merge the two clusters that raise the inertia least.

    Args:
        G: ``(M, P, P)`` Gram matrices. k: ``(M,)`` long, clusters wanted, ``1 .. P``.

    Returns:
        ``(M, P)`` long labels ``0 .. k-1``, numbered by each cluster's first unit; every cluster has a member.

    Raises:
        LinAlgError: The distances are not finite.
    """
    M, P, _ = G.shape
    if not bool((k < P).any()):
        return torch.arange(P, device=G.device).repeat(M, 1)
    from scipy.cluster.hierarchy import linkage  # here, for it takes a quarter of a second to import

    i, j = torch.triu_indices(P, P, 1, device=G.device)
    square = G.diagonal(dim1=1, dim2=2)
    apart = _distance(square[:, i], square[:, j], G.flatten(1)[:, i * P + j]).sqrt()  # of every pair once
    if not bool(torch.isfinite(apart).all()):
        raise torch.linalg.LinAlgError("the distances between units are not finite")  # pyright: ignore[reportPrivateImportUsage]
    labels: list[list[int]] = []
    for pairs, clusters in zip(apart.cpu().numpy(), k.tolist(), strict=True):
        tree = linkage(pairs, "ward")[: P - clusters, :2].astype(int).tolist()  # what is merged, the nearest first
        labels.append(_cut(tree, P))
    return renumber(torch.tensor(labels, device=G.device))


def _cut(tree: list[list[int]], P: int) -> list[int]:
    """For each of `P` points the last cluster it went into, where row t of `tree` makes cluster ``P + t`` of two."""
    last = list(range(P + len(tree)))
    for t in reversed(range(len(tree))):
        for part in tree[t]:
            last[part] = last[P + t]
    return last[:P]


def plus_plus(G: Tensor, k: Tensor, generator: torch.Generator) -> Tensor:
    """k-means++ start: centres drawn one by one with probability proportional to the squared distance.

    All modules use the same random numbers, so that none depends on which others are in the batch.

    Args:
        G: ``(M, P, P)``. k: ``(M,)`` long. generator: On the CPU, so that every device draws the same numbers.

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
        to_centre = _distance(square, square[rows, centre, None], G[rows, centre])
        to_centre = torch.where((k > step)[:, None], to_centre, torch.inf)
        labels = torch.where(to_centre < nearest, step, labels)
        nearest = torch.minimum(nearest, to_centre)
    return labels


def lloyd(G: Tensor, labels: Tensor, k: Tensor, max_steps: int = 100) -> tuple[Tensor, Tensor]:
    """Lloyd's iterations in Gram space until no unit moves.

    ``|x_p - mean_c|^2 = G_pp - 2/n sum_j G_pj + 1/n^2 sum_ij G_ij`` over the members i, j of c. A unit stays where
    it is on a tie; a cluster that runs empty is refilled with the unit farthest from its centre.

    Args:
        G: ``(M, P, P)``. labels: ``(M, P)`` long start. k: ``(M,)`` long.

    Returns:
        ``labels (M, P)`` and ``inertia (M,)``, the summed squared distance to the centres.
    """
    square = G.diagonal(dim1=1, dim2=2)
    live = torch.arange(int(k.max()), device=G.device) < k[:, None]  # (M, k)
    for _ in range(max_steps):
        labels = _refill(G, labels, live)
        distance = _to_centres(G, labels, live)
        current = distance.gather(2, labels[:, :, None])[:, :, 0]
        best, nearest = distance.min(2)
        moved = best < current - 1e-12 * square.amax(1, keepdim=True)
        if not bool(moved.any()):
            return labels, current.sum(1)
        labels = torch.where(moved, nearest, labels)
    labels = _refill(G, labels, live)
    return labels, _own_distance(G, labels, live).sum(1)


def _to_centres(G: Tensor, labels: Tensor, live: Tensor) -> Tensor:
    """Squared distance of every unit to every cluster's mean, ``(M, P, k)``; infinite for empty clusters."""
    Z = torch.nn.functional.one_hot(labels, live.shape[1]).to(G)  # (M, P, k)
    n = Z.sum(1)
    GZ = (G @ Z) / n.clamp_min(1)[:, None, :]
    mean_square = (Z * GZ).sum(1) / n.clamp_min(1)
    distance = G.diagonal(dim1=1, dim2=2)[:, :, None] - 2 * GZ + mean_square[:, None, :]
    return distance.clamp_min(0).masked_fill((n == 0)[:, None, :], torch.inf)


def _own_distance(G: Tensor, labels: Tensor, live: Tensor) -> Tensor:
    """Squared distance of every unit to the mean of its own cluster, ``(M, P)``."""
    return _to_centres(G, labels, live).gather(2, labels[:, :, None])[:, :, 0]


def _refill(G: Tensor, labels: Tensor, live: Tensor) -> Tensor:
    """Give every empty cluster the unit that sits farthest from its own centre (as scikit-learn does)."""
    while True:
        count = torch.nn.functional.one_hot(labels, live.shape[1]).sum(1)
        empty = (count == 0) & live
        m = empty.any(1).nonzero()[:, 0]
        if len(m) == 0:
            return labels
        shared = count[m].gather(1, labels[m]) > 1  # never empty one cluster to fill another
        unit = torch.where(shared, _own_distance(G[m], labels[m], live[m]), -1.0).argmax(1)
        labels = labels.clone()
        labels[m, unit] = empty[m].int().argmax(1)


def renumber(labels: Tensor) -> Tensor:
    """Number clusters by their first unit, so that equal partitions have equal labels. ``(M, P)`` long."""
    P = labels.shape[1]
    unit = torch.arange(P, device=labels.device).expand_as(labels)
    first = labels.new_full((len(labels), int(labels.max()) + 1), P).scatter_reduce_(1, labels, unit, "amin")
    return first.argsort(1).argsort(1).gather(1, labels)


def kmeans(G: Tensor, k: Tensor, *, starts: int = 0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Cluster points given by their Gram matrices: Ward's tree cut at `k`, then Lloyd; the best of several starts.

    Minimises the same objective as scikit-learn's ``KMeans``. The partition depends neither on the order of the
    points (unless several have the same norm) nor on the other modules of the batch.

    Args:
        G: ``(M, P, P)`` float64 Gram matrices of the points.
        k: ``(M,)`` long, clusters per module, ``1 .. P``.
        starts: Further k-means++ starts beside Ward's.
        seed: Of the k-means++ draws.

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
