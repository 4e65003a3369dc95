"""Pool: all units of a batch of like modules."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from ..digest import content_key
from . import gram
from .factors import Factors, InMemoryFactors


@dataclass(eq=False)
class GramValues:
    """Values of a pool's units that depend on no weight, as far as they were computed.

    Args:
        products: ``A A^T`` and ``B^T B``, ``(M, P, P)`` float64 each.
        adapter_svds: SVD of every adapter's delta without the user's weight, in terms of its own units.
    """

    products: tuple[Tensor, Tensor] | None = None
    adapter_svds: tuple[gram.GramSVD, ...] | None = None

    @property
    def nbytes(self) -> int:
        return sum(value.nbytes for value in (*(self.products or ()), *(self.adapter_svds or ())))


@dataclass(frozen=True, eq=False)
class Pool:
    """The pooled units of `M` modules that share shape and ranks: ``delta[m] = B[m] @ diag(c[m]) @ A[m]``.

    The user's weight and the file's scale are not multiplied into the factors. They are one coefficient per unit,
    which folds into the small matrices.

    Args:
        names: The `M` module names.
        factors: The adapters' rows of `A` one below the other, the columns of `B` side by side.
        scale: ``(M, P)`` float64, the file's scale of each unit; equal for all units of an adapter in a module.
        weights: ``(M, N)`` float64, the user's weight of each adapter that takes part; not 0, may be negative.
        ranks: Rank of each adapter that takes part; they add up to `P`.
        adapters: Positions of these adapters in the user's list.
    """

    names: tuple[str, ...]
    factors: Factors
    scale: Tensor
    weights: Tensor
    ranks: tuple[int, ...]
    adapters: tuple[int, ...]
    values: GramValues = field(default_factory=GramValues, init=False)

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
        """All rows, loaded at once: ``(M, P, d_in)`` float32. `factors.pieces` loads a few modules at a time."""
        return self.factors.whole[0]

    @property
    def B(self) -> Tensor:
        """All columns, loaded at once: ``(M, d_out, P)`` float32."""
        return self.factors.whole[1]

    @property
    def max_rank(self) -> int:
        """The highest rank that a sum of the deltas can have."""
        return min(self.factors.shape[1:])

    @cached_property
    def owner(self) -> Tensor:
        """``(P,)`` long: the adapter of each unit, as an index into `adapters`."""
        return torch.repeat_interleave(torch.tensor(self.ranks, device=self.device))

    @cached_property
    def c(self) -> Tensor:
        """``(M, P)`` float64: weight * scale of each unit."""
        return self.weights[:, self.owner] * self.scale

    @property
    def spans(self) -> list[slice]:
        """The units of each adapter."""
        ends = list(accumulate(self.ranks))
        return [slice(end - rank, end) for end, rank in zip(ends, self.ranks, strict=True)]

    def split(self, values: Tensor, dim: int) -> tuple[Tensor, ...]:
        """Split a dimension of length `P` into one part per adapter."""
        return values.split(self.ranks, dim)

    @property
    def G_A(self) -> Tensor:
        """``A A^T (M, P, P)`` float64."""
        return self._products()[0]

    @property
    def G_B(self) -> Tensor:
        """``B^T B (M, P, P)`` float64."""
        return self._products()[1]

    def _products(self) -> tuple[Tensor, Tensor]:
        if self.values.products is None:
            self.values.products = gram.products(self.factors)
        return self.values.products

    @property
    def adapter_svds(self) -> tuple[gram.GramSVD, ...]:
        """SVD of every adapter's delta without the user's weight, in terms of its own units."""
        if self.values.adapter_svds is None:
            G_A, G_B = self._products()
            self.values.adapter_svds = tuple(
                gram.svd(G_A[:, span, span], G_B[:, span, span], self.scale[:, span]) for span in self.spans
            )
        return self.values.adapter_svds

    @cached_property
    def svd(self) -> gram.GramSVD:
        """SVD of the summed delta of every module, in terms of the pooled units."""
        return gram.svd(self.G_A, self.G_B, self.c)

    @cached_property
    def inner(self) -> Tensor:
        """``<delta_i, delta_j> (M, N, N)`` float64, weights included; they add up to the squared norm of the sum."""
        member = torch.nn.functional.one_hot(self.owner, len(self.ranks)) * self.c[:, :, None]  # (M, P, N)
        return member.mT @ (self.G_A * self.G_B) @ member

    @cached_property
    def content(self) -> Hashable:
        """Stands for everything that `values` depend on: factors, ranks, scales, and their device."""
        scale = self.scale.cpu().numpy().tobytes()
        return str(self.device), self.ranks, scale, tuple(content_key(tensor) for tensor in self.factors.tensors())

    def with_units(self, A: Tensor, B: Tensor) -> Pool:
        """A pool of other units of the same adapters, which contain the weights and scales."""
        scale, weights = torch.ones_like(self.scale), torch.ones_like(self.weights)
        return replace(self, factors=InMemoryFactors(A, B), scale=scale, weights=weights)


def overlap(pool: Pool, lost: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The size of each adapter's delta, and the similarity of any two.

    Args:
        pool: The pool.
        lost: ``(M, N)``, squared norm of what approximations at reading cut off from each delta; ``None`` for nothing.

    Returns:
        ``norms (M, N)``: Frobenius norms. ``cosine (M, N, N)``: ``<delta_i, delta_j> / (|delta_i| |delta_j|)``,
        0 where one is zero.
    """
    inner = pool.inner if lost is None else pool.inner + torch.diag_embed(lost.to(pool.inner))
    norms = inner.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    scale = norms[:, :, None] * norms[:, None, :]
    return norms, torch.where(scale > 0, inner / torch.where(scale > 0, scale, 1), 0)
