"""Key maps: bring adapters whose files name (and fuse) the same layers differently to common module names.

A host library knows the names: it hands over a `KeyMap`, plain data that says for each module of a file which rows
of its update go to which target. The values are untouched, so the mapping is exact. A fused ``qkv`` becomes three
targets that share `A` and cut `B`.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MergeError
from ..lowrank import LowRank, concat

Spans = tuple[tuple[int, int], ...]  # (start, stop) row ranges, concatenated in this order


@dataclass(frozen=True)
class Piece:
    """One target layer fed by a module: `rows` of the module's output make up all of `target`; ``None`` = all rows."""

    target: str
    rows: Spans | None = None


def spans_of(rows: Tensor) -> Spans:
    """Row numbers ``(n,)`` long, n at least 1, as the ranges they run through, in their order."""
    breaks = torch.nonzero(rows[1:] != rows[:-1] + 1)[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in itertools.pairwise(edges))


KeyMap = Mapping[str, tuple[Piece, ...]]


@dataclass(frozen=True)
class ParameterSlice:
    """Where a module sits in a host's parameter: rows ``start .. stop`` of `key`.

    Args:
        order: Row permutation the host applies to the update on the way (e.g. scale and shift halves swapped).
    """

    key: str
    start: int
    stop: int
    order: Spans | None = None


def refine(places: Mapping[str, ParameterSlice], leaf: Callable[[str, int, int], str]) -> KeyMap:
    """Cut every place at every boundary any other place of the same key has, so that all pieces line up.

    Args:
        places: Module name -> place, over ALL adapters to be merged.
        leaf: Names the piece ``(key, start, stop)``.

    Returns:
        The key map under which modules of different files overlap completely or not at all.
    """
    boundaries: dict[str, set[int]] = defaultdict(set)
    for place in places.values():
        boundaries[place.key] |= {place.start, place.stop}
    key_map: dict[str, tuple[Piece, ...]] = {}
    for name, place in places.items():
        cuts = sorted(b for b in boundaries[place.key] if place.start <= b <= place.stop)
        key_map[name] = tuple(
            Piece(leaf(place.key, a, b), _compose(place.order, a - place.start, b - place.start, place))
            for a, b in itertools.pairwise(cuts)
        )
    return key_map


def _compose(order: Spans | None, start: int, stop: int, place: ParameterSlice) -> Spans | None:
    whole = (start, stop) == (0, place.stop - place.start)
    if order is None:
        return None if whole else ((start, stop),)
    if not whole:
        raise MergeError("A permuted layer cannot also be split.", module=place.key)
    return order


def rename(adapter: Adapter, key_map: KeyMap) -> Adapter:
    """The adapter under the key map's target names. Exact; modules the map does not know keep their own name.

    Two modules that land on one target (a file with ``qkv`` AND ``to_q``) are added, as a loader adds them.
    """
    modules: dict[str, LowRank] = {}
    for name, part in adapter.modules.items():
        for piece in key_map.get(name, (Piece(name),)):
            cut = part if piece.rows is None else part.rows(piece.rows)
            known = modules.get(piece.target)
            modules[piece.target] = cut if known is None else concat([known, cut], [1.0, 1.0])
    diffs: dict[str, Tensor] = {}
    for name, tensor in adapter.diffs.items():
        module, _, parameter = name.rpartition(".")
        for piece in key_map.get(module, (Piece(module),)):
            cut = tensor if piece.rows is None else torch.cat([tensor[a:b] for a, b in piece.rows])
            target = f"{piece.target}.{parameter}"
            diffs[target] = diffs[target] + cut if target in diffs else cut
    return replace(adapter, modules=modules, diffs=diffs)


def unmapped(adapters: Iterable[Adapter], key_map: KeyMap) -> list[str]:
    """Modules of the adapters that the key map does not know, sorted."""
    return sorted({name for adapter in adapters for name in adapter.modules} - set(key_map))
