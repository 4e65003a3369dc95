"""Linear algebra on Gram matrices of the units, batched over modules.

With ``G_A = A A^T`` and ``G_B = B^T B`` (both ``(M, P, P)``, float64) a sum of deltas ``B diag(c) A`` is decomposed
without touching the long dimensions again.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..precision import float32_is_exact
from .clustering import cluster_sizes
from .factors import Factors

# Relative size below which a direction is rounding noise of the float32 factors.
_NOISE = 1e-7
# Sine of the angle between a unit and the span of the others from which float32 tells them apart for certain.
_CLEAR_SINE = 1e-2


@dataclass(frozen=True, eq=False)
class GramSVD:
    """``B diag(c) A = (B R_B) (R_A A)`` in balanced SVD form: ``R_A A = sqrt(S) V^T``, ``B R_B = U sqrt(S)``.

    Args:
        S: ``(M, P)`` singular values, descending.
        R_A: ``(M, P, P)``. R_B: ``(M, P, P)``. Row (column) i belongs to ``S[:, i]`` and is zero where that is noise.
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
    L, L_inverse = _square_root(G_A)
    cL = c[:, :, None] * L
    squares, V = torch.linalg.eigh(cL.mT @ G_B @ cL)
    S = squares.clamp_min(0).sqrt().flip(1)
    V = V.flip(2)
    keep = _NOISE * S[:, :1].clamp_min(torch.finfo(S.dtype).tiny) < S
    S = torch.where(keep, S, 0)
    S_root = S.sqrt()
    S_inverse_root = torch.where(keep, 1 / torch.where(keep, S_root, 1), 0)
    return GramSVD(S, S_root[:, :, None] * (V.mT @ L_inverse), (cL @ V) * S_inverse_root[:, None, :])


def _square_root(G: Tensor) -> tuple[Tensor, Tensor]:
    """``L (M, P, P)`` with ``L L^T = G``, and its inverse; directions of `G` that are noise are left out.

    `L` is Cholesky's, several times as fast as eigenvectors, for matrices whose directions are all far from noise.
    """
    L, failed = torch.linalg.cholesky_ex(G)
    pivots = L.diagonal(dim1=1, dim2=2)
    sound = (failed == 0) & (pivots.amin(1) > 1000 * _NOISE * pivots.amax(1))
    eye = torch.eye(G.shape[1], dtype=G.dtype, device=G.device)
    L_inverse = torch.linalg.solve_triangular(torch.where(sound[:, None, None], L, eye), eye, upper=False)
    rest = (~sound).nonzero()[:, 0]
    if len(rest):
        values, vectors = torch.linalg.eigh(G[rest])
        keep = values > _NOISE**2 * values[:, -1:].clamp_min(torch.finfo(values.dtype).tiny)
        root = torch.where(keep, values, 0).sqrt()
        inverse_root = torch.where(keep, 1 / torch.where(keep, root, 1), 0)
        L[rest], L_inverse[rest] = vectors * root[:, None, :], inverse_root[:, :, None] * vectors.mT
    return L, L_inverse


def best_rank_one(G_A: Tensor, G_B: Tensor, labels: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best rank-one approximation of the mean ``1/n sum_j b_j a_j^T`` of every cluster.

    Where the two largest singular values are close, the result may lie between their directions, which keeps nearly
    as much.

    Args:
        G_A: ``(M, P, P)``. G_B: ``(M, P, P)``. labels: ``(M, P)`` long, the cluster of each unit, ``0 .. k-1``.

    Returns:
        ``alpha, beta (M, P, k)``: the merged row is ``alpha^T A``, its column ``B beta``, both of the same norm.

    Source: Eckart-Young, for rank 1.
    """
    n = cluster_sizes(labels, k)  # (M, k)
    order, start = labels.sort(dim=1, stable=True).indices, n.cumsum(1) - n
    alpha, beta = G_A.new_zeros(*labels.shape, k), G_A.new_zeros(*labels.shape, k)
    size = torch.where(n > 1, (n + 7) // 8 * 8, n)  # clusters of similar size are padded to one size, and batched
    for s in size[n > 0].unique().tolist():
        m, c = (size == s).nonzero(as_tuple=True)
        place = torch.arange(s, device=n.device)
        inside = place < n[m, c, None]  # (C, s)
        units = order[m[:, None], (start[m, c, None] + place).clamp_max(labels.shape[1] - 1)]
        both = (inside[:, :, None] & inside[:, None, :]).to(G_A)
        a, b = top_pair(*(_submatrices(G, m, units).mul_(both) for G in (G_A, G_B)))
        cluster = inside.nonzero()[:, 0]
        position = (m[cluster], units[inside], c[cluster])
        root = n[m, c, None].to(G_A).rsqrt()  # of the 1/n, half of it on each factor
        alpha[position], beta[position] = (a * root)[inside], (b * root)[inside]
    return alpha, beta


def _submatrices(G: Tensor, m: Tensor, units: Tensor) -> Tensor:
    """Rows and columns ``units (C, s)`` of the matrices ``m (C,)`` of `G`: ``(C, s, s)``."""
    return G[m[:, None], units].gather(2, units[:, None, :].expand(-1, units.shape[1], -1))


def top_pair(G_A: Tensor, G_B: Tensor, steps: int = 64) -> tuple[Tensor, Tensor]:
    """Coefficients ``alpha, beta (C, s)`` of the best rank-one approximation ``(B beta)(alpha^T A)`` of ``B A``.

    Power iteration on the coefficients of `s` units: for ``v = A^T alpha`` the image is ``B A v``, that is
    ``beta = G_A alpha``, and back alike with ``G_B``. A small matrix ``T = G_A G_B`` is squared, which halves the
    `steps`, as long as that takes less time than they do.

    The start is the largest unit, so a single unit is returned as it is. However large, a unit may be orthogonal to
    the leading direction, or nearly so. The eigenvalues of `T` are the squared singular values of ``B A``, and the
    traces of its powers bound the largest: where that leaves room for 5 % more energy, generic starts are tried too,
    and the best is taken if it has 1 % more.

    Args:
        G_A: ``(C, s, s)`` Gram matrices ``A A^T``, float64. G_B: ``(C, s, s)``, ``B^T B``.
    """
    sizes = (G_A * G_B).diagonal(dim1=1, dim2=2)
    (T, trace), s, power = _scaled(G_A @ G_B), G_A.shape[1], 1
    log_bound = trace.log()
    while steps > 1 and s < 12 * steps:
        T, trace = _scaled(T @ T)
        steps, power = steps // 2, 2 * power
        log_bound += trace.log() / power
    start = sizes.argmax(1)[:, None, None]
    alpha, beta, energy = _iterate(T.gather(1, start.expand(-1, 1, s)), T, steps, G_A, G_B)
    unsure = (energy[:, 0] < 0.95 * log_bound.exp()).nonzero()[:, 0]
    if len(unsure):
        rows = unsure if 4 * len(unsure) < len(T) else slice(None)  # copied only where they are few
        generic = _generic_starts(sizes[rows]) @ T[rows]
        alphas, betas, energies = _iterate(generic, T[rows], steps, G_A[rows], G_B[rows])
        most, best = energies.max(1, keepdim=True)
        better, best = (most > 1.01 * energy[rows])[:, :, None], best[:, :, None].expand(-1, 1, s)
        alpha[rows] = torch.where(better, alphas.gather(1, best), alpha[rows])
        beta[rows] = torch.where(better, betas.gather(1, best), beta[rows])
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
    """Power iteration from rows ``alpha (C, q, s)``, which are the result of its first step.

    Returns:
        ``alpha, beta (C, q, s)`` of equal norms, and ``(C, q)`` the energy ``sigma^2`` of each pair.
    """
    for _ in range(steps - 1):
        alpha = alpha / nonzero_or_one(alpha.abs().amax(2, keepdim=True)) @ T
    alpha, image_A = _to_unit_length(alpha, G_A)
    beta, image_B = _to_unit_length(image_A, G_B)
    sigma = (image_B * image_A).sum(2).clamp_min(0)  # u^T B A v
    root = sigma.sqrt()[:, :, None]
    return alpha * root, beta * root, sigma.square()


def _scaled(T: Tensor) -> tuple[Tensor, Tensor]:
    """`T`, in place, divided by its trace, and the trace ``(C,)``: the sum of the eigenvalues, all at least 0."""
    trace = T.diagonal(dim1=1, dim2=2).sum(1)
    T /= nonzero_or_one(trace)[:, None, None]
    return T, trace


def _to_unit_length(x: Tensor, G: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients ``x (C, q, s)`` scaled to unit length under `G`, and ``x @ G``; zero stays zero."""
    xG = x @ G
    length = nonzero_or_one((x * xG).sum(2, keepdim=True).clamp_min(0).sqrt())
    return x / length, xG / length


def nonzero_or_one(x: Tensor) -> Tensor:
    """`x`, which is at least 0, with 1 in place of 0: to divide by."""
    return torch.where(x > 0, x, 1)


def products(factors: Factors) -> tuple[Tensor, Tensor]:
    """``A A^T`` and ``B^T B``, ``(M, P, P)`` float64, in one pass over the factors.

    In general the products are float64, so that the square of a condition number does not reach the results. For
    values stored in 16 bits float32 is enough as long as no unit is nearly in the span of others: products with an
    error of about 1e-6 are the exact ones of factors that differ from these by ``1e-6 / (2 * _CLEAR_SINE)``, a
    fraction of the file's own rounding (2^-12 in float16).
    """
    if factors.short and float32_is_exact(factors.device):
        G_A, G_B = _products(factors, torch.float32)
        unclear = (~(_units_are_clear(G_A) & _units_are_clear(G_B))).nonzero()[:, 0].tolist()
        if unclear:
            G_A[unclear], G_B[unclear] = _products(factors.only(unclear), torch.float64)
        return G_A, G_B
    return _products(factors, torch.float64)


def _products(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    M, P, _, _ = factors.shape
    G_A, G_B = torch.empty(2, M, P, P, dtype=torch.float64, device=factors.device)
    for at, A, B in factors.pieces():
        gram_matrix(A, dtype, G_A[at])
        gram_matrix(B.mT, dtype, G_B[at])
    return G_A, G_B


def _units_are_clear(G: Tensor) -> Tensor:
    """``(M,)`` bool: whether float32 products tell all units apart, and none is too small or too large for float32."""
    L, failed = torch.linalg.cholesky_ex(G)
    square = G.diagonal(dim1=1, dim2=2)
    sine = L.diagonal(dim1=1, dim2=2) > _CLEAR_SINE * square.sqrt()
    limits = torch.finfo(torch.float32)
    return (failed == 0) & (sine & (square > limits.tiny / limits.eps)).all(1)


def gram_matrix(X: Tensor, dtype: torch.dtype, out: Tensor, *, rows: int = 256, part: int = 64) -> None:
    """Write ``X X^T``, multiplied in `dtype`, into ``out (M, P, P)``; most of its upper half is mirrored.

    Args:
        X: ``(M, P, d)``. rows: Rows of `X` converted to `dtype` at a time. part: Rows multiplied at a time.
    """
    for start in range(0, X.shape[1], rows):
        converted = X[:, start : start + rows].to(dtype)
        for other in range(0, start, rows):
            _write_block(out, start, other, converted @ X[:, other : other + rows].to(dtype).mT)
        for i in range(0, converted.shape[1], part):
            _write_block(out, start + i, start, converted[:, i : i + part] @ converted[:, : i + part].mT)


def _write_block(G: Tensor, row: int, column: int, block: Tensor) -> None:
    """Write a block of a symmetric matrix, and the mirror image of its columns before `row`."""
    down, across = slice(row, row + block.shape[1]), slice(column, column + block.shape[2])
    G[:, down, across] = block
    left = min(row - column, block.shape[2])
    G[:, column : column + left, down] = block[:, :, :left].mT
