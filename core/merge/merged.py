"""Merged: the result of a merge method for a pool, and its error against the sum of the deltas."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..precision import float32_is_exact, matmul
from .factors import Factors
from .pool import Pool

_SAMPLED = 8  # columns of A and rows of B, at least, whose rounding errors are measured


@dataclass(frozen=True, eq=False)
class LinearCombination:
    """Merged units as linear combinations of pooled units: ``A' = R_A @ A``, ``B' = B @ R_B``.

    Args:
        R_A: ``(M, k, P)`` float64. R_B: ``(M, P, k)`` float64. Rows (columns) past a module's own rank are zero.
        ranks: ``(M,)`` long, the merged rank of each module, at most `k`.
        labels: ``(M, P)`` long, the cluster of each unit; ``None`` for a method that does not cluster.
    """

    R_A: Tensor
    R_B: Tensor
    ranks: Tensor
    labels: Tensor | None = None

    def units(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """The merged units: ``A (M, k, d_in)`` and ``B (M, d_out, k)``, float32."""
        return _multiply(pool, self.R_A.float(), self.R_B.float(), None)

    def apply(self, pool: Pool) -> Merged:
        """The merged units as a result, with what `relative_error` needs."""
        R_A, R_B = self.R_A.float(), self.R_B.float()
        pooled = Sample.empty(pool, pool.size, torch.float64)
        computed = Sample.empty(pool, R_A.shape[1], torch.float32)
        A, B = _multiply(pool, R_A, R_B, (pooled, computed))
        rounded = replace(self, R_A=R_A.double(), R_B=R_B.double())
        exact = Sample(torch.bmm(rounded.R_A, pooled.A), torch.bmm(pooled.B, rounded.R_B))
        return Merged(A, B, self.ranks, self.labels, derivation=Derivation(rounded, pool.factors, computed, exact))


@dataclass(frozen=True, eq=False)
class Sample:
    """Evenly spaced entries of `n` units: every s-th column of `A` and every t-th row of `B`.

    Args:
        A: ``(M, n, 8 .. 15)``. B: ``(M, 8 .. 15, n)``. All columns (rows) where there are fewer.
    """

    A: Tensor
    B: Tensor

    @classmethod
    def empty(cls, pool: Pool, n: int, dtype: torch.dtype) -> Sample:
        """Memory for a sample of `n` units as wide as the pool's."""
        M, _, d_in, d_out = pool.factors.shape
        columns, rows = (len(range(0, width, _step(width))) for width in (d_in, d_out))
        A = torch.empty(M, n, columns, dtype=dtype, device=pool.device)
        return cls(A, torch.empty(M, rows, n, dtype=dtype, device=pool.device))

    def copy(self, at: slice, A: Tensor, B: Tensor) -> None:
        """Copy the entries of ``A (m, n, d_in)`` and ``B (m, d_out, n)``, which belong to the modules `at`."""
        self.A[at] = A[:, :, :: _step(A.shape[2])]
        self.B[at] = B[:, :: _step(B.shape[1])]


def _step(width: int) -> int:
    return max(1, width // _SAMPLED)


def _multiply(pool: Pool, R_A: Tensor, R_B: Tensor, samples: tuple[Sample, Sample] | None) -> tuple[Tensor, Tensor]:
    """``R_A @ A`` and ``B @ R_B``, float32; the samples of the pooled and the merged units are filled."""
    (M, _, d_in, d_out), k = pool.factors.shape, R_A.shape[1]
    A, B = R_A.new_empty(M, k, d_in), R_B.new_empty(M, d_out, k)
    multiply = torch.bmm if float32_is_exact(pool.device) else matmul
    for at, A_at, B_at in pool.factors.pieces():
        multiply(R_A[at], A_at, out=A[at])
        multiply(B_at, R_B[at], out=B[at])
        if samples is not None:  # copied while the piece is in the processor's cache
            samples[0].copy(at, A_at, B_at)
            samples[1].copy(at, A[at], B[at])
    return A, B


@dataclass(frozen=True, eq=False)
class Derivation:
    """How merged units were computed from pooled units.

    Args:
        combination: The linear combination: the float32 coefficients that were multiplied, as float64.
        factors: The pooled units.
        computed: A sample of the merged units, float32.
        exact: The same entries without rounding, float64.
    """

    combination: LinearCombination
    factors: Factors
    computed: Sample
    exact: Sample


@dataclass(frozen=True, eq=False)
class Merged:
    """The result of a merge method for a pool.

    Args:
        A: ``(M, k, d_in)``. B: ``(M, d_out, k)``. Both float32, scale 1; rows (columns) past `ranks` are zero.
        ranks: ``(M,)`` long.
        labels: ``(M, P)`` long or ``None``, see `LinearCombination`.
        remarks: Module name -> what the user should know about its merge; equal remarks are reported together.
        derivation: How `A` and `B` were computed, if they are a linear combination of units.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    labels: Tensor | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)
    derivation: Derivation | None = None


def relative_error(
    pool: Pool, merged: Merged, dtype: torch.dtype = torch.float32, lost: Tensor | None = None
) -> Tensor:
    """``|merged - sum|_F / |sum|_F`` per module, ``(M,)`` float64, of the merged factors as they are stored.

    Where the sum is zero it is ``|merged|_F``. It follows from Gram matrices, those of the pool and of the result:
    ``|B' A' - B C A|^2 = <B'^T B', A' A'^T> - 2 <B^T B', C A A'^T> + |B C A|^2``.

    For a linear combination of the pool they are small products of ``G_A`` and ``G_B``, exact but for the rounding
    errors ``dA, dB`` of the stored factors. Those are measured on a sample, which is far cheaper than a product of all
    factors and still shows any loss of precision, in the products or in the conversion to `dtype`. Extrapolated to
    all columns and rows, ``|B' dA|^2 + |dB A'|^2`` is added.

    What approximations at reading cut off belongs to the sum and is missing in the merge. It is orthogonal to the
    update it was cut off from; its products with other updates are neglected.

    Args:
        pool: The merged pool. merged: The result in float32. dtype: Dtype it is stored in.
        lost: ``(M,)``, squared norm of what was cut off from each module's sum; ``None`` for nothing.
    """
    total = pool.inner.sum((1, 2)).clamp_min(0)
    derivation = merged.derivation
    if derivation is None or derivation.factors is not pool.factors:
        A, B = merged.A.to(dtype).double(), merged.B.to(dtype).double()
        to_A, to_B = pool.A.double() @ A.mT, pool.B.double().mT @ B
        error = _squared_error(pool, A @ A.mT, B.mT @ B, to_A, to_B, total)
    else:
        R_A, R_B = derivation.combination.R_A, derivation.combination.R_B
        to_A, to_B = pool.G_A @ R_A.mT, pool.G_B @ R_B
        G_A, G_B = R_A @ to_A, R_B.mT @ to_B
        error = _squared_error(pool, G_A, G_B, to_A, to_B, total)
        computed, exact = derivation.computed, derivation.exact
        dA, dB = computed.A.to(dtype) - exact.A, computed.B.to(dtype) - exact.B
        B_dA, dB_A = (torch.bmm(G_B, dA) * dA).sum((1, 2)), (torch.bmm(dB, G_A) * dB).sum((1, 2))
        error.add_(B_dA, alpha=merged.A.shape[2] / dA.shape[2]).add_(dB_A, alpha=merged.B.shape[1] / dB.shape[1])
    if lost is not None:
        error, total = error + lost.to(error), total + lost.to(total)
    return (error / torch.where(total > 0, total, 1)).sqrt()


def _squared_error(pool: Pool, G_A: Tensor, G_B: Tensor, to_A: Tensor, to_B: Tensor, total: Tensor) -> Tensor:
    """``|B' A' - B C A|_F^2`` per module, ``(M,)``.

    Args:
        G_A: ``A' A'^T (M, k, k)``. G_B: ``B'^T B'``. to_A: ``A A'^T (M, P, k)``. to_B: ``B^T B'``.
        total: ``|B C A|_F^2 (M,)``.
    """
    own = (G_B * G_A).sum((1, 2))
    cross = (to_B * (pool.c[:, :, None] * to_A)).sum((1, 2))
    return (own - 2 * cross + total).clamp_min(0)
