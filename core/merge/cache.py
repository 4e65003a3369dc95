"""Gram matrices and decompositions of a merge, kept for the next merge of the same adapters."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field, replace
from threading import Lock

from .pool import GramValues, Pool


@dataclass(frozen=True, eq=False)
class _Entry:
    content: Hashable
    values: GramValues


@dataclass
class GramCache:
    """The values of a merge that do not depend on rank, method and weights.

    An entry belongs to the tensors it was computed from, and only as long as nothing is written to them: it does not
    serve a file that was loaded again. It holds Gram matrices and decompositions, never the factors.

    Args:
        limit: Bytes that may be kept. Values beyond the limit are computed again.
    """

    limit: int = 512 << 20
    _entries: dict[Hashable, _Entry] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def restore(self, batch: Hashable, pool: Pool) -> None:
        """Give a batch's pool the values that were computed from the same factors before."""
        entry = self._entries.get(batch)
        if entry is not None and entry.content == pool.content:
            pool.values.products, pool.values.adapter_svds = entry.values.products, entry.values.adapter_svds

    def store(self, batch: Hashable, pool: Pool) -> None:
        """Keep the values of a batch's pool, in place of the batch's former entry. Thread-safe."""
        entry = _Entry(pool.content, replace(pool.values))  # outside of the lock: it may have to hash the factors
        with self._lock:
            self._entries.pop(batch, None)
            if sum(other.values.nbytes for other in self._entries.values()) + entry.values.nbytes <= self.limit:
                self._entries[batch] = entry
