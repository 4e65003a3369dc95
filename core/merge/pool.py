"""Pool: all units of a batch of like modules, and what merge methods make of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..digest import content_hash
from ..precision import matmul
from . import gram
from .factors import Factors, InMemoryFactors


@dataclass(frozen=True, eq=False)
class Pool:
    """The pooled units of `M` modules that share shape and ranks: ``delta[m] = B[m] @ diag(c[m]) @ A[m]``.

    The user's weight and the file's scale are not multiplied into the factors but kept as one coefficient per unit,
    so that they fold into the small matrices.

    Args:
        names: The `M` module names.
        factors: The adapters' rows of `A` one below the other, the columns of `B` alike.
        scale: ``(M, P)`` float64, the file's scale of each unit, the same in a module of an adapter.
        weights: ``(M, N)`` float64, the user's weight of each adapter that takes part; not 0, may be negative.
        ranks: Rank of each adapter that takes part; they add up to `P`.
        adapters: Which adapters these are (positions in the user's list).
    """

    names: tuple[str, ...]
    factors: Factors
    scale: Tensor
    weights: Tensor
    ranks: tuple[int, ...]
    adapters: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of pooled units `P`."""
        return self.factors.shape[1]

    @property
    def batch(self) -> int:
        """Number of modules `M`."""
        return self.factors.shape[0]

    @property
    def device(self) -> torch.device:
        return self.factors.device

    @property
    def A(self) -> Tensor:
        """All rows at once, ``(M, P, d_in)`` float32; `factors.pieces` gives those of a few modules at a time."""
        return self.factors.whole[0]

    @property
    def B(self) -> Tensor:
        """All columns at once, ``(M, d_out, P)`` float32."""
        return self.factors.whole[1]

    @property
    def max_rank(self) -> int:
        """The highest rank a sum of the deltas can have."""
        return min(self.factors.shape[1:])

    @cached_property
    def owner(self) -> Tensor:
        """``(P,)`` long: for each unit, which of `adapters` it came from (an index into that tuple)."""
        return torch.repeat_interleave(torch.tensor(self.ranks, device=self.device))

    @cached_property
    def c(self) -> Tensor:
        """``(M, P)`` float64: weight * scale of each unit."""
        return self.weights[:, self.owner] * self.scale

    @property
    def spans(self) -> list[slice]:
        """Where each adapter's units are."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    def split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Cut a dimension of length `P` into one part per adapter."""
        return values.split(self.ranks, dim)

    @cached_property
    def _products(self) -> tuple[Tensor, Tensor]:
        return gram.products(self.factors)

    @cached_property
    def G_A(self) -> Tensor:
        """``A A^T (M, P, P)`` float64."""
        return self._products[0]

    @cached_property
    def G_B(self) -> Tensor:
        """``B^T B (M, P, P)`` float64."""
        return self._products[1]

    @cached_property
    def own(self) -> tuple[gram.GramSVD, ...]:
        """SVD of every adapter's delta without the user's weight, in terms of its own units."""
        return tuple(gram.svd(self.G_A[:, at, at], self.G_B[:, at, at], self.scale[:, at]) for at in self.spans)

    @cached_property
    def inner(self) -> Tensor:
        """``<delta_i, delta_j> (M, N, N)`` float64, weights included: their sum is the squared norm of the sum."""
        member = torch.nn.functional.one_hot(self.owner, len(self.ranks)) * self.c[:, :, None]  # (M, P, N)
        return member.mT @ (self.G_A * self.G_B) @ member

    @cached_property
    def content(self) -> bytes:
        """Hash of all that `cacheable` depends on: factors, scales, and the device they are on."""
        found = hashlib.sha256(f"{self.device} {self.ranks}".encode())
        found.update(self.scale.cpu().numpy())
        for tensor in self.factors.tensors():
            found.update(content_hash(tensor))
        return found.digest()

    @property
    def cacheable(self) -> dict[str, Any]:
        """What was computed of the units so far and depends on no weight."""
        return {name: self.__dict__[name] for name in ("G_A", "G_B", "own") if name in self.__dict__}

    def load_cache(self, values: Mapping[str, Any]) -> None:
        """Take what was computed of the same units before, see `cacheable`."""
        self.__dict__.update(values)  # where a cached_property keeps its value

    def with_units(self, A: Tensor, B: Tensor) -> Pool:
        """Other units of the same adapters, which contain the weights and scales."""
        ones = torch.ones_like(self.scale), torch.ones_like(self.weights)
        return replace(self, factors=InMemoryFactors(A, B), scale=ones[0], weights=ones[1])

    @cached_property
    def svd(self) -> gram.GramSVD:
        """SVD of the summed delta of every module, in terms of the pooled units."""
        return gram.svd(self.G_A, self.G_B, self.c)


@dataclass(frozen=True, eq=False)
class LinearCombination:
    """Merged units as linear combinations of pooled ones: ``A' = R_A @ A``, ``B' = B @ R_B``.

    Args:
        R_A: ``(M, k, P)`` float64. R_B: ``(M, P, k)`` float64. Rows (columns) past a module's own rank are zero.
        ranks: ``(M,)`` long, the merged rank of each module, at most `k`.
        labels: ``(M, P)`` long, the cluster each unit went into; ``None`` where a method does not cluster.
    """

    R_A: Tensor
    R_B: Tensor
    ranks: Tensor
    labels: Tensor | None = None

    def units(self, pool: Pool) -> tuple[Tensor, Tensor]:
        """The merged units: ``A (M, k, d_in)`` and ``B (M, d_out, k)``, float32."""
        return _multiply(pool, self.R_A.float(), self.R_B.float(), None)

    def apply(self, pool: Pool) -> Merged:
        """The merged units as a result, with all that `relative_error` needs to know of them."""
        R_A, R_B = self.R_A.float(), self.R_B.float()
        inputs = Sample.empty(pool, pool.size, torch.float64)
        outputs = Sample.empty(pool, R_A.shape[1], torch.float32)
        A, B = _multiply(pool, R_A, R_B, (inputs, outputs))
        rounded = replace(self, R_A=R_A.double(), R_B=R_B.double())
        exact = Sample(torch.bmm(rounded.R_A, inputs.A), torch.bmm(inputs.B, rounded.R_B))
        return Merged(A, B, self.ranks, self.labels, derivation=Derivation(rounded, pool.factors, outputs, exact))


@dataclass(frozen=True, eq=False)
class Sample:
    """Evenly spaced entries of units: 8 to 15 columns of `A` and rows of `B` (all of narrow ones).

    Args:
        A: ``(M, n, s)``. B: ``(M, t, n)``, for `n` units.
    """

    A: Tensor
    B: Tensor

    @classmethod
    def empty(cls, pool: Pool, n: int, dtype: torch.dtype) -> Sample:
        """Space for a sample of `n` units of a pool's width."""
        M, _, d_in, d_out = pool.factors.shape
        s, t = (len(range(0, width, _step(width))) for width in (d_in, d_out))
        return cls(*(torch.empty(M, *shape, dtype=dtype, device=pool.device) for shape in ((n, s), (t, n))))

    def copy(self, at: slice, A: Tensor, B: Tensor) -> None:
        """Take the entries of ``A (m, n, d_in)`` and ``B (m, d_out, n)``, the modules `at`."""
        self.A[at] = A[:, :, :: _step(A.shape[2])]
        self.B[at] = B[:, :: _step(B.shape[1])]


def _step(width: int) -> int:
    return max(1, width // 8)


def _multiply(pool: Pool, R_A: Tensor, R_B: Tensor, samples: tuple[Sample, Sample] | None) -> tuple[Tensor, Tensor]:
    """``R_A @ A`` and ``B @ R_B``, float32; samples of the pool's units and of the product are taken on the way."""
    (M, _, d_in, d_out), k = pool.factors.shape, R_A.shape[1]
    A, B = R_A.new_empty(M, k, d_in), R_B.new_empty(M, d_out, k)
    for at, A_at, B_at in pool.factors.pieces():
        matmul(R_A[at], A_at, out=A[at])
        matmul(B_at, R_B[at], out=B[at])
        if samples is not None:  # while they are in the processor's cache
            samples[0].copy(at, A_at, B_at)
            samples[1].copy(at, A[at], B[at])
    return A, B


@dataclass(frozen=True, eq=False)
class Derivation:
    """How merged units were computed from pooled ones.

    Args:
        combination: The linear combination: the float32 values that were multiplied, as float64.
        factors: The pooled units it combines.
        found: A sample of the merged units.
        exact: The same entries without rounding, float64.
    """

    combination: LinearCombination
    factors: Factors
    found: Sample
    exact: Sample


@dataclass(frozen=True, eq=False)
class Merged:
    """What a method returns for a pool.

    Args:
        A: ``(M, k, d_in)``. B: ``(M, d_out, k)``. Both float32, scale 1; rows (columns) past `ranks` are zero.
        ranks: ``(M,)`` long.
        labels: ``(M, P)`` long or ``None``, see `LinearCombination`.
        remarks: Module name -> what the user should know about its merge; equal remarks are reported together.
        derivation: How `A` and `B` were computed, where they are a linear combination of units.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    labels: Tensor | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)
    derivation: Derivation | None = None


def relative_error(pool: Pool, merged: Merged, dtype: torch.dtype = torch.float32) -> Tensor:
    """``|merged - sum|_F / |sum|_F`` per module, ``(M,)`` float64, of the merged factors as they are stored.

    Where the sum is zero it is ``|merged|_F``. From Gram matrices only:
    ``|B' A' - B C A|^2 = <B'^T B', A' A'^T> - 2 <B^T B', C A A'^T> + |sum|^2``.

    Of a linear combination of the pool these are the Gram matrices of the exact ``R_A A`` and ``B R_B``. By how much
    the stored factors differ from those, ``dA`` and ``dB``, is measured on a sample, which costs next to nothing
    beside another product of all factors and shows any loss of precision, in the products as in the conversion to
    `dtype`. Its ``|B' dA|^2 + |dB A'|^2``, extrapolated to all columns and rows, is added.

    Args:
        pool: What was merged. merged: The result in float32. dtype: What it is stored in.
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
        found, exact = derivation.found, derivation.exact
        dA, dB = found.A.to(dtype) - exact.A, found.B.to(dtype) - exact.B
        in_A, in_B = (torch.bmm(G_B, dA) * dA).sum((1, 2)), (torch.bmm(dB, G_A) * dB).sum((1, 2))
        error.add_(in_A, alpha=merged.A.shape[2] / dA.shape[2]).add_(in_B, alpha=merged.B.shape[1] / dB.shape[1])
    return (error / torch.where(total > 0, total, 1)).sqrt()


def _squared_error(pool: Pool, G_A: Tensor, G_B: Tensor, to_A: Tensor, to_B: Tensor, total: Tensor) -> Tensor:
    """``|B' A' - B C A|_F^2`` per module.

    Args:
        G_A: ``A' A'^T``. G_B: ``B'^T B'``. to_A: ``A A'^T``. to_B: ``B^T B'``. total: ``|B C A|_F^2``.
    """
    own = (G_B * G_A).sum((1, 2))
    cross = (to_B * (pool.c[:, :, None] * to_A)).sum((1, 2))
    return (own - 2 * cross + total).clamp_min(0)


def overlap(pool: Pool) -> tuple[Tensor, Tensor]:
    """How large each adapter's delta is, and how alike any two are.

    Returns:
        ``norms (M, N)``: Frobenius norms. ``cosine (M, N, N)``: ``<delta_i, delta_j> / (|delta_i| |delta_j|)``,
        0 where one is zero.
    """
    norms = pool.inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    return norms, torch.where(scale > 0, pool.inner / torch.where(scale > 0, scale, 1), 0)
