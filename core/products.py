"""Gram matrices of a merge, kept for the next merge of the same adapters."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from torch import Tensor

from .pool import Pool


@dataclass
class Products:
    """What does not change with rank, method and weights: it belongs to one list of adapters.

    Args:
        limit: Bytes that may be kept; what is beyond them is computed anew.
    """

    limit: int = 512 << 20
    _kept: dict[Hashable, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False)

    def share(self, batch: Hashable, pool: Pool) -> None:
        """Give a batch's pool its Gram matrices, where they are known; else take them from it."""
        known = self._kept.get(batch)
        if known is not None:
            pool.know(*known)
            return
        grams = (pool.G_A, pool.G_B)
        if sum(G.nbytes for pair in [*self._kept.values(), grams] for G in pair) <= self.limit:
            self._kept[batch] = grams
