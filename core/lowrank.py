"""LowRank: the update of one weight matrix by a LoRA, as two thin factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .errors import FormatError, MergeError
from .precision import exact_operand, matmul


@dataclass(frozen=True, eq=False)
class LowRank:
    """The update of one module: ``delta = scale * B @ A`` with ``scale = alpha / rank``.

    The factors are always two-dimensional: those of a convolution are flattened (``d_in = in_channels *
    prod(kernel)``) and folded back by the formats. A unit is one row of `A` with its column of `B`.

    Args:
        A: ``(r, d_in)``, any floating dtype.
        B: ``(d_out, r)``, same rank as `A`.
        alpha: The trainer's alpha; ``None`` means ``alpha = r``, which is scale 1.
        kernel: Kernel size of a convolution, ``()`` for a linear layer.
        lost: Squared Frobenius norm of what an approximation at reading cut off, 0 for an exact update. The part that
            was cut off is orthogonal to the update.

    Raises:
        FormatError: Factors that are not 2-D floating tensors of one rank, a kernel that does not divide ``d_in``,
            or an alpha that is not a finite number.
    """

    A: Tensor
    B: Tensor
    alpha: float | None = None
    kernel: tuple[int, ...] = ()
    lost: float = 0.0

    def __post_init__(self) -> None:
        for name, factor in (("A", self.A), ("B", self.B)):
            if factor.ndim != 2 or not factor.is_floating_point():
                raise FormatError(
                    f"Factor {name} is not a 2-D floating point matrix.",
                    expected="(r, d_in)" if name == "A" else "(d_out, r)",
                    found=f"{tuple(factor.shape)} {factor.dtype}",
                )
        if self.A.shape[0] != self.B.shape[1] or self.A.shape[0] == 0 or 0 in (self.d_in, self.d_out):
            raise FormatError(
                "The factors A and B do not fit together.",
                expected="A (r, d_in) and B (d_out, r) with the same r of at least 1",
                found=f"A {tuple(self.A.shape)}, B {tuple(self.B.shape)}",
                remedy="the file is damaged or was resized by hand: export it again",
            )
        if self.kernel and self.d_in % math.prod(self.kernel):
            raise FormatError(
                "The kernel does not divide the input width.",
                expected=f"d_in a multiple of {self.kernel}",
                found=self.d_in,
            )
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise FormatError("alpha is not a finite number.", found=self.alpha)

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def d_in(self) -> int:
        return self.A.shape[1]

    @property
    def d_out(self) -> int:
        return self.B.shape[0]

    @property
    def scale(self) -> float:
        return 1.0 if self.alpha is None else self.alpha / self.rank

    @property
    def dtype(self) -> torch.dtype:
        return torch.promote_types(*(merge_dtype(x.dtype) for x in (self.A, self.B)))

    def delta(self) -> Tensor:
        """The dense update ``scale * B @ A``, ``(d_out, d_in)`` float32. For tests and small models."""
        return self.scale * matmul(self.B.float(), self.A.float())

    def energy(self) -> float:
        """The squared Frobenius norm of the update."""
        return self.scale**2 * product_energy(self.A.double(), self.B.double())

    def rows(self, spans: Sequence[tuple[int, int]]) -> LowRank:
        """The update of some output rows, in the given order: exact, with the same `A` and rows of `B`.

        Args:
            spans: ``(start, stop)`` pairs within ``0 .. d_out``; their rows are concatenated.

        Raises:
            FormatError: No span, or one that is empty or outside ``0 .. d_out``.

        `lost` is divided in proportion to the number of rows.
        """
        if not spans or any(not 0 <= start < stop <= self.d_out for start, stop in spans):
            raise FormatError("Row slice out of range.", expected=f"within 0 .. {self.d_out}", found=list(spans))
        rows = [self.B[start:stop] for start, stop in spans]
        B = rows[0] if len(rows) == 1 else torch.cat(rows)
        return replace(self, B=B, lost=self.lost * B.shape[0] / self.d_out)

    def to(self, dtype: torch.dtype) -> LowRank:
        return replace(self, A=self.A.to(dtype), B=self.B.to(dtype))


def merge_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype in which a merged factor is stored: the input's, but bfloat16 for 8-bit floats, which carry no scale."""
    return torch.bfloat16 if dtype.itemsize == 1 else dtype


def fold_tucker(down: Tensor, mid: Tensor) -> Tensor:
    """Fold a Tucker core into the down factor, exactly: ``A[p, c, *kernel] = sum_q mid[p, q, *kernel] down[q, c]``.

    Args:
        down: ``(r, in, 1, ..)``. mid: ``(r, r, *kernel)``.

    Returns:
        ``(r, in, *kernel)`` float32.
    """
    mid, down = exact_operand(mid.float()), exact_operand(down.flatten(1).float())
    return torch.einsum("pq...,qc->pc...", mid, down).float()


def concat(parts: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """Concatenate the units of several updates: ``delta = sum_i weights[i] * parts[i].delta()``, exactly, in float32.

    The weight and scale of a part are split evenly over both factors; the sign goes to `B`.

    Raises:
        MergeError: Updates of different shapes.

    Source: arXiv:2409.16167, concatenation-summation equivalence.
    """
    if len({(part.d_out, part.d_in) for part in parts}) != 1:
        raise MergeError("Cannot concatenate updates of different shapes.", found=[(p.d_out, p.d_in) for p in parts])
    coefficients = [weight * part.scale for part, weight in zip(parts, weights, strict=True)]
    A = torch.cat([math.sqrt(abs(c)) * part.A.float() for part, c in zip(parts, coefficients, strict=True)])
    B = torch.cat(
        [math.copysign(math.sqrt(abs(c)), c) * part.B.float() for part, c in zip(parts, coefficients, strict=True)], 1
    )
    lost = sum(weight**2 * part.lost for part, weight in zip(parts, weights, strict=True))
    return LowRank(A, B, kernel=max((part.kernel for part in parts), key=len), lost=lost)


def reduce_to_width(part: LowRank) -> LowRank:
    """The same update with one unit per direction of the layer, ``min(d_out, d_in)``; rounded to its dtype."""
    k = min(part.d_out, part.d_in)
    A, B = best_rank_k(part.B.double() @ part.A.double(), k)
    return LowRank(A.to(part.dtype), B.to(part.dtype), part.scale * k, part.kernel, part.lost)


def product_energy(A: Tensor, B: Tensor) -> float:
    """``|B A|_F^2`` from the smaller of Gram matrices and blocks of rows; never forms ``B @ A``.

    Args:
        A: ``(P, d_in)``. B: ``(d_out, P)``; both float64.
    """
    if A.shape[0] <= min(A.shape[1], B.shape[0]):
        return float(((A @ A.mT) * (B.mT @ B)).sum().clamp_min(0))
    return sum(float((rows @ A).square().sum()) for rows in B.split(256))


def truncated_svd(A: Tensor, B: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Best rank-`k` approximation of ``B @ A``, by two thin QRs and an SVD; never forms ``B @ A``.

    Args:
        A: ``(P, d_in)``. B: ``(d_out, P)``; same floating dtype, float64 for full accuracy.
        k: Rank, ``1 .. P``. Where ``B @ A`` has fewer than `k` directions the rest are zero.

    Returns:
        ``(A, B)`` in balanced form: ``A = sqrt(S) V^T (k, d_in)``, ``B = U sqrt(S) (d_out, k)``.
    """
    dtype, A, B = A.dtype, exact_operand(A), exact_operand(B)
    Q_A, R_A = torch.linalg.qr(A.mT)  # (d_in, p), (p, P)
    Q_B, R_B = torch.linalg.qr(B)  # (d_out, q), (q, P)
    U, S, Vh = torch.linalg.svd(R_B @ R_A.mT, full_matrices=False)  # (q, n), (n,), (n, p)
    n = min(k, S.shape[0])
    root = S[:n].sqrt()
    A_k, B_k = root[:, None] * (Vh[:n] @ Q_A.mT), (Q_B @ U[:, :n]) * root
    if n < k:
        A_k = torch.nn.functional.pad(A_k, (0, 0, 0, k - n))
        B_k = torch.nn.functional.pad(B_k, (0, k - n))
    return A_k.to(dtype), B_k.to(dtype)


def best_rank_k(D: Tensor, k: int, *, power: int = 4) -> tuple[Tensor, Tensor]:
    """Best rank-`k` approximation of a dense matrix: exact if it is small, else by randomised subspace iteration.

    The random start is always the same, so equal inputs give equal results.

    Args:
        D: ``(d_out, d_in)``.
        k: Rank, ``1 .. min(d_out, d_in)``.
        power: Number of iterations; each squares the weight of large singular values relative to small ones.

    Returns:
        ``(A, B)`` in balanced form, as from `truncated_svd`.

    Source: Halko, Martinsson, Tropp, arXiv:0909.4061, algorithms 4.4 and 5.1.
    """
    dtype, D = D.dtype, exact_operand(D)
    width = 2 * k + 16
    if min(D.shape) <= max(2 * width, 256):
        Q = torch.eye(D.shape[0], dtype=D.dtype, device=D.device)
    else:
        start = torch.randn(D.shape[1], width, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
        Q = torch.linalg.qr(D @ start.to(D)).Q
        for _ in range(power):
            Q = torch.linalg.qr(D @ torch.linalg.qr(D.mT @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.mT @ D, full_matrices=False)
    root = S[:k].sqrt()
    return (root[:, None] * Vh[:k]).to(dtype), ((Q @ U[:, :k]) * root).to(dtype)
