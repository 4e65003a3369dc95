"""Gram matrices and decompositions of a merge, kept for the next merge of the same adapters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from .pool import Pool


@dataclass
class GramCache:
    """What does not change with rank, method and weights: it belongs to one list of adapters.

    Args:
        limit: Bytes that may be kept; what is beyond them is computed anew.
    """

    limit: int = 512 << 20
    _kept: dict[Hashable, Mapping[str, Any]] = field(default_factory=dict, init=False, repr=False)
    _sizes: dict[Hashable, int] = field(default_factory=dict, init=False, repr=False)
    _one: Lock = field(default_factory=Lock, init=False, repr=False)

    def restore(self, batch: Hashable, pool: Pool) -> None:
        """Tell a batch's pool what is known of it."""
        pool.load_cache(self._kept.get(batch, {}))

    def store(self, batch: Hashable, pool: Pool) -> None:
        """Keep what a batch's pool knows by now. Batches may come from several threads."""
        known = pool.cacheable
        parts = [part for value in known.values() for part in (value if isinstance(value, tuple) else (value,))]
        size = sum(part.nbytes for part in parts)
        with self._one:
            if sum(self._sizes.values()) - self._sizes.get(batch, 0) + size <= self.limit:
                self._kept[batch], self._sizes[batch] = known, size
