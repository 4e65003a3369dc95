"""Gram matrices and decompositions of a merge, kept for the next merge of the same adapters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

from .pool import Pool


@dataclass(frozen=True, eq=False)
class _Entry:
    content: bytes
    values: Mapping[str, Any]
    size: int


@dataclass
class GramCache:
    """What a merge computes that does not depend on rank, method and weights.

    An entry belongs to the contents of the factors it was computed from: it serves a file that was loaded again, not
    another one of the same shapes. It holds Gram matrices and decompositions, never the factors.

    Args:
        limit: Bytes that may be kept. What exceeds them is computed again.
    """

    limit: int = 512 << 20
    _entries: dict[Hashable, _Entry] = field(default_factory=dict, init=False, repr=False)
    _lock: Lock = field(default_factory=Lock, init=False, repr=False)

    def restore(self, batch: Hashable, pool: Pool) -> None:
        """Give a batch's pool what was computed from the same factors before."""
        entry = self._entries.get(batch)
        if entry is not None and entry.content == pool.content:
            pool.load_cache(entry.values)

    def store(self, batch: Hashable, pool: Pool) -> None:
        """Keep what a batch's pool has computed, instead of the batch's former entry. Thread-safe."""
        values = pool.cacheable
        parts = [part for value in values.values() for part in (value if isinstance(value, tuple) else (value,))]
        size = sum(part.nbytes for part in parts)
        with self._lock:
            others = sum(entry.size for key, entry in self._entries.items() if key != batch)
            self._entries.pop(batch, None)
            if others + size <= self.limit:
                self._entries[batch] = _Entry(pool.content, values, size)
