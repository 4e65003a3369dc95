"""LoHa, LoKr and full deltas as low-rank updates: factorised exactly, then cut to the rank asked for.

All in float64; the results are float32. A LoHa or LoKr delta is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import FormatError
from ..lowrank import LowRank, truncate


def loha(parts: Mapping[str, Tensor], alpha: float | None, k: int) -> LowRank:
    """The best rank-`k` update for ``(w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r`` (elementwise product).

    The product of two rank-r matrices has rank r^2 at most, with factors that pair every unit of the one with every
    unit of the other: ``B[:, pq] = B1[:, p] * B2[:, q]`` and ``A[pq] = A1[p] * A2[q]`` (Khatri-Rao).

    Args:
        parts: ``hada_w1_a (d_out, r)``, ``hada_w1_b (r, d_in)``, the same for ``w2``; with ``hada_t1``, ``hada_t2``
            ``(r, r, *kernel)`` the first are ``(r, d_out)`` and the second ``(r, in)``.

    Source: arXiv:2108.06098.
    """
    (A1, B1, kernel), (A2, B2, _) = (_hada(parts, index) for index in (1, 2))
    A = (A1[:, None] * A2).flatten(0, 1)
    B = (B1[:, :, None] * B2[:, None]).flatten(1)
    rank = parts["hada_w1_b"].shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    return _lowrank(*truncate(A, scale * B, k), kernel)


def _hada(parts: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    a, b = (parts[f"hada_w{index}_{x}"].double() for x in "ab")
    core = parts.get(f"hada_t{index}")
    if core is None:
        return b.flatten(1), a.flatten(1), tuple(b.shape[2:])
    A = torch.einsum("ij...,jc->ic...", core.double(), b)
    return A.flatten(1), a.mT, tuple(core.shape[2:])


def lokr(parts: Mapping[str, Tensor], alpha: float | None, k: int) -> LowRank:
    """The best rank-`k` update for ``kron(w1, w2) * scale``.

    The singular triplets of a Kronecker product are the products of its factors' triplets, so the `k` largest
    products are the answer.

    Args:
        parts: ``lokr_w1 (o1, i1)`` or ``lokr_w1_a @ lokr_w1_b``; ``lokr_w2 (o2, i2, *kernel)`` or its two factors,
            which with ``lokr_t2 (r, r, *kernel)`` are ``(r, o2)`` and ``(r, i2)``.
        alpha: Counts only where a factor is itself a product: ``scale = alpha / r`` with r of ``w2``, else of ``w1``.
    """
    w1, rank_1 = _kron_factor(parts, 1)
    w2, rank_2 = _kron_factor(parts, 2)
    rank = rank_2 or rank_1
    scale = alpha / rank if alpha is not None and rank else 1.0
    kernel = tuple(w2.shape[2:])
    U1, S1, V1 = torch.linalg.svd(w1.flatten(1), full_matrices=False)
    U2, S2, V2 = torch.linalg.svd(w2.flatten(1), full_matrices=False)
    S = torch.outer(S1, S2).flatten()
    top = torch.argsort(S, descending=True, stable=True)[:k]
    first, second = top // len(S2), top % len(S2)
    A = (V1[first][:, :, None] * V2[second][:, None]).flatten(1)
    B = (U1[:, first][:, None] * U2[:, second]).flatten(0, 1)
    root = S[top].sqrt()
    return _lowrank(root[:, None] * A, scale * B * root, kernel)


def _kron_factor(parts: Mapping[str, Tensor], index: int) -> tuple[Tensor, int]:
    """The factor, and its inner rank if it is stored as a product, else 0."""
    whole = parts.get(f"lokr_w{index}")
    if whole is not None:
        return whole.double(), 0
    a, b = (parts[f"lokr_w{index}_{x}"].double() for x in "ab")
    core = parts.get(f"lokr_t{index}")
    if core is not None:
        return torch.einsum("ij...,io,jc->oc...", core.double(), a, b), b.shape[0]
    return (a @ b.flatten(1)).reshape(a.shape[0], *b.shape[1:]), b.shape[0]


def full(delta: Tensor, k: int) -> LowRank:
    """The best rank-`k` update for a whole delta ``(d_out, ...)``, by the eigenvectors of its smaller Gram matrix."""
    D = delta.double().flatten(1)
    tall = D.shape[0] > D.shape[1]
    gram = D.mT @ D if tall else D @ D.mT
    energy, vectors = torch.linalg.eigh(gram)  # ascending
    Q, S = vectors[:, -k:].flip(1), energy[-k:].flip(0).clamp_min(0).sqrt()  # (n, k), (k,)
    root = S.sqrt()
    # a direction below the rounding of the Gram matrix has no partner: zero, not noise over zero
    inverse = torch.where(1e-7 * S[0] < S, 1 / root, 0)
    A, B = (root[:, None] * Q.mT, D @ Q * inverse) if tall else (inverse[:, None] * (Q.mT @ D), Q * root)
    return _lowrank(A, B, tuple(delta.shape[2:]))


def _lowrank(A: Tensor, B: Tensor, kernel: tuple[int, ...]) -> LowRank:
    return LowRank(A.float().contiguous(), B.float().contiguous(), kernel=kernel)


def check_rank(convert_rank: int | None) -> None:
    """Raise unless the rank asked for is at least 1 (or not given)."""
    if convert_rank is not None and convert_rank < 1:
        raise FormatError("The rank to convert to must be at least 1.", expected="e.g. 32", found=convert_rank)
