"""LoHa, LoKr and full differences as low-rank updates: factorised exactly, then truncated to the requested rank.

All in float64; the results are float32, and `LowRank.lost` says how much was cut off. Neither a LoHa or LoKr delta nor
a factor that is stored as a product is ever formed as a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping

import torch
from torch import Tensor

from ..errors import FormatError
from ..lowrank import LowRank, product_energy, truncated_svd

# Elements of the factors of one module; a few times as many are in memory at once, in float64. Without a limit a file
# of some kB could request any size: a Kronecker product, or a Tucker core, is larger than its stored factors.
_MAX_ELEMENTS = 1 << 27


def check_factor_size(elements: int) -> None:
    """Raise if the factors of a module have more elements than those of any model.

    Raises:
        FormatError: They have.
    """
    if elements > _MAX_ELEMENTS:
        raise FormatError(
            "Written out, the factors of this module are larger than those of any model.",
            expected=f"at most {_MAX_ELEMENTS} elements",
            found=elements,
            remedy="the file is damaged or malicious; a LoHa can only be converted if its rank is lower",
        )


def loha(parts: Mapping[str, Tensor], alpha: float | None, k: int) -> LowRank:
    """The best rank-`k` update for ``(w1_a @ w1_b) * (w2_a @ w2_b) * alpha / r`` (elementwise product).

    The elementwise product of two rank-r matrices has rank r^2 at most. Its factors pair every unit of the first with
    every unit of the second: ``B[:, pq] = B1[:, p] * B2[:, q]`` and ``A[pq] = A1[p] * A2[q]`` (Khatri-Rao).

    Args:
        parts: ``hada_w1_a (d_out, r)``, ``hada_w1_b (r, d_in)``, the same for ``w2``; with ``hada_t1``, ``hada_t2``
            ``(r, r, *kernel)`` the first are ``(r, d_out)`` and the second ``(r, in)``.
        alpha: The trainer's alpha; ``None`` means scale 1.
        k: Rank of the result.

    Source: arXiv:2108.06098.
    """
    (A1, B1, kernel), (A2, B2, _) = (_hada_factors(parts, index) for index in (1, 2))
    check_factor_size(A1.shape[0] * A2.shape[0] * (A1.shape[1] + B1.shape[0]))
    A = (A1[:, None] * A2).flatten(0, 1)
    B = (B1[:, :, None] * B2[:, None]).flatten(1)
    rank = parts["hada_w1_b"].shape[0]
    scale = 1.0 if alpha is None else alpha / rank
    return low_rank_of_total(*truncated_svd(A, scale * B, k), kernel, product_energy(A, scale * B))


def _hada_factors(parts: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """``(A, B, kernel)`` of one of the two products."""
    a, b = (parts[f"hada_w{index}_{x}"].double() for x in "ab")
    core = parts.get(f"hada_t{index}")
    if core is None:
        return b.flatten(1), a.flatten(1), tuple(b.shape[2:])
    check_factor_size(core.numel() // max(1, core.shape[1]) * b.shape[1])
    A = torch.einsum("ij...,jc->ic...", core.double(), b)
    return A.flatten(1), a.mT, tuple(core.shape[2:])


def lokr(parts: Mapping[str, Tensor], alpha: float | None, k: int) -> LowRank:
    """The best rank-`k` update for ``kron(w1, w2) * scale``.

    The singular triplets of a Kronecker product are the products of its factors' triplets, so the result consists of
    the `k` largest products.

    Args:
        parts: ``lokr_w1 (o1, i1)`` or ``lokr_w1_a @ lokr_w1_b``; ``lokr_w2 (o2, i2, *kernel)`` or its two factors,
            which with ``lokr_t2 (r, r, *kernel)`` are ``(r, o2)`` and ``(r, i2)``.
        alpha: The trainer's alpha. Counts only where a factor is itself a product: ``scale = alpha / r`` with r of
            ``w2``, else of ``w1``.
        k: Rank of the result.
    """
    (A1, B1, _, rank_1), (A2, B2, kernel, rank_2) = (_kron_factors(parts, index) for index in (1, 2))
    rank = rank_2 or rank_1
    scale = alpha / rank if alpha is not None and rank else 1.0
    # rows of a balanced A are as long as the square roots of the singular values
    S = torch.outer(A1.square().sum(1), A2.square().sum(1)).flatten()
    top = torch.argsort(S, descending=True, stable=True)[:k]
    check_factor_size(len(top) * (A1.shape[1] * A2.shape[1] + B1.shape[0] * B2.shape[0]))
    first, second = top // len(A2), top % len(A2)
    A = (A1[first][:, :, None] * A2[second][:, None]).flatten(1)
    B = (B1[:, first][:, None] * B2[:, second]).flatten(0, 1)
    return low_rank_of_total(A, scale * B, kernel, scale**2 * float(S.square().sum()))


def _kron_factors(parts: Mapping[str, Tensor], index: int) -> tuple[Tensor, Tensor, tuple[int, ...], int]:
    """``(A, B, kernel, inner rank)`` of ``w1`` or ``w2``: in balanced SVD form, rank 0 if it is stored whole."""
    whole = parts.get(f"lokr_w{index}")
    if whole is not None:
        U, S, Vh = torch.linalg.svd(whole.double().flatten(1), full_matrices=False)
        root = S.sqrt()
        return root[:, None] * Vh, U * root, tuple(whole.shape[2:]), 0
    a, b = (parts[f"lokr_w{index}_{x}"].double() for x in "ab")
    core = parts.get(f"lokr_t{index}")
    if core is None:
        return *truncated_svd(b.flatten(1), a, min(a.shape[0], *b.flatten(1).shape)), tuple(b.shape[2:]), b.shape[0]
    check_factor_size(core.numel() // max(1, core.shape[1]) * b.shape[1])
    right = torch.einsum("ij...,jc->ic...", core.double(), b)  # (r, i2, *kernel)
    A, B = right.flatten(1), a.mT
    return *truncated_svd(A, B, min(B.shape[0], *A.shape)), tuple(core.shape[2:]), b.shape[0]


def is_matrix(difference: Tensor) -> bool:
    """Whether a full difference can be approximated: not a vector, nor one with dimensions of size 1 (modulations)."""
    return difference.ndim > 1 and difference.shape[0] != 1 and math.prod(difference.shape[1:]) != 1


def full(delta: Tensor, k: int) -> LowRank:
    """The best rank-`k` update for a full difference ``(d_out, ...)``, from its smaller Gram matrix."""
    D = delta.double().flatten(1)
    tall = D.shape[0] > D.shape[1]
    gram = D.mT @ D if tall else D @ D.mT
    energy, vectors = torch.linalg.eigh(gram)  # ascending
    Q, S = vectors[:, -k:].flip(1), energy[-k:].flip(0).clamp_min(0).sqrt()  # (n, k), (k,)
    root = S.sqrt()
    # directions below the rounding error of the Gram matrix: zero instead of noise divided by zero
    inverse = torch.where(1e-7 * S[0] < S, 1 / root, 0)
    A, B = (root[:, None] * Q.mT, D @ Q * inverse) if tall else (inverse[:, None] * (Q.mT @ D), Q * root)
    return low_rank_of_total(A, B, tuple(delta.shape[2:]), float(D.square().sum()))


def low_rank_of_total(A: Tensor, B: Tensor, kernel: tuple[int, ...], total: float) -> LowRank:
    """The update with the energy that it lacks of `total`, that of the whole delta."""
    lost = total - product_energy(A, B)
    lost = lost if lost > 1e-9 * total else 0.0  # less is the rounding error of the energies
    return LowRank(A.float().contiguous(), B.float().contiguous(), kernel=kernel, lost=lost)


def approximation_note(label: str, kinds: Iterable[str], updates: Collection[LowRank], rank: int) -> str:
    """A sentence for reports on updates that were approximated at a rank."""
    kept, lost = sum(update.energy() for update in updates), sum(update.lost for update in updates)
    return (
        f"{label}: {len(updates)} layers ({', '.join(kinds)}) were approximated at rank {rank}, which keeps "
        f"{kept / (kept + lost or 1):.1%} of their energy"
    )


def check_convert_rank(convert_rank: int | None) -> None:
    """Raise unless the requested rank is at least 1 or ``None``.

    Raises:
        FormatError: It is not.
    """
    if convert_rank is not None and convert_rank < 1:
        raise FormatError("The rank to convert to must be at least 1.", expected="e.g. 32", found=convert_rank)
