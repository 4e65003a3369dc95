"""Pool: all units of a batch of like modules, and what merge methods make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

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

    @property
    def cacheable(self) -> dict[str, Any]:
        """What was computed of the units so far and depends on no weight."""
        return {name: self.__dict__[name] for name in ("G_A", "G_B", "own") if name in self.__dict__}

    def with_units(self, A: Tensor, B: Tensor) -> Pool:
        """Other units of the same adapters, which contain the weights and scales."""
        ones = torch.ones_like(self.scale), torch.ones_like(self.weights)
        return replace(self, factors=InMemoryFactors(A, B), scale=ones[0], weights=ones[1])

    def load_cache(self, known: Mapping[str, Any]) -> None:
        """Take what was computed before of the same units, see `known`, instead of computing it."""
        self.__dict__.update(known)  # where a cached_property keeps its value

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

    def apply(self, pool: Pool) -> Merged:
        R_A, R_B = self.R_A.float(), self.R_B.float()
        (M, _, d_in, d_out), k = pool.factors.shape, R_A.shape[1]
        A, B = R_A.new_empty(M, k, d_in), R_B.new_empty(M, d_out, k)
        for at, A_at, B_at in pool.factors.pieces():
            torch.bmm(R_A[at], A_at, out=A[at])
            torch.bmm(B_at, R_B[at], out=B[at])
        return Merged(A, B, self.ranks, self.labels, combination=replace(self, R_A=R_A, R_B=R_B))


@dataclass(frozen=True, eq=False)
class Merged:
    """What a method returns for a pool.

    Args:
        A: ``(M, k, d_in)``. B: ``(M, d_out, k)``. Both float32, scale 1; rows (columns) past `ranks` are zero.
        ranks: ``(M,)`` long.
        labels: ``(M, P)`` long or ``None``, see `LinearCombination`.
        remarks: Module name -> what the user should know about its merge; equal remarks are reported together.
        mixing: How they follow from the pool's own units, where they do; saves reading the factors once more.
    """

    A: Tensor
    B: Tensor
    ranks: Tensor
    labels: Tensor | None = None
    remarks: Mapping[str, str] = field(default_factory=dict)
    combination: LinearCombination | None = None


def relative_error(pool: Pool, merged: Merged) -> Tensor:
    """``|merged - sum|_F / |sum|_F`` per module, ``(M,)`` float64, from Gram matrices only.

    Where the sum is zero it is ``|merged|_F``.

    ``|B' A' - B C A|^2 = <B'^T B', A' A'^T> - 2 <B^T B' , C A A'^T> + |sum|^2``.
    """
    if merged.combination is None:
        A, B = merged.A.double(), merged.B.double()
        G_A, G_B = A @ A.mT, B.mT @ B
        to_A, to_B = pool.A.double() @ A.mT, pool.B.double().mT @ B
    else:
        R_A, R_B = merged.combination.R_A.double(), merged.combination.R_B.double()
        to_A, to_B = pool.G_A @ R_A.mT, pool.G_B @ R_B
        G_A, G_B = R_A @ to_A, R_B.mT @ to_B
    own = (G_B * G_A).sum((1, 2))
    cross = (to_B * (pool.c[:, :, None] * to_A)).sum((1, 2))
    total = pool.inner.sum((1, 2)).clamp_min(0)
    error = (own - 2 * cross + total).clamp_min(0)
    return (error / torch.where(total > 0, total, 1)).sqrt()


def overlap(pool: Pool) -> tuple[Tensor, Tensor]:
    """How large each adapter's delta is, and how alike any two are.

    Returns:
        ``norms (M, N)``: Frobenius norms. ``cosine (M, N, N)``: ``<delta_i, delta_j> / (|delta_i| |delta_j|)``,
        0 where one is zero.
    """
    norms = pool.inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    return norms, torch.where(scale > 0, pool.inner / torch.where(scale > 0, scale, 1), 0)
