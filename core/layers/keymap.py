"""Key maps: common module names for adapters whose files name (and fuse) the same layers differently.

A host library knows the names. It provides a `KeyMap`, plain data that says for each module of a file which rows of its
update belong to which target layer. Values are not changed, so the mapping is exact: a fused ``qkv`` becomes three
targets that share `A` and split `B`.
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

Spans = tuple[tuple[int, int], ...]  # (start, stop) ranges of rows, concatenated in this order


@dataclass(frozen=True)
class MappedRows:
    """Rows of a module that are the whole update of a target layer.

    Args:
        target: Name of the target layer.
        rows: Rows of the module's output, in the target's order; ``None`` for all rows.
    """

    target: str
    rows: Spans | None = None


KeyMap = Mapping[str, tuple[MappedRows, ...]]
"""Module name -> all rows of the module, by target layer."""


def rows_to_spans(rows: Tensor) -> Spans:
    """Row numbers, int64 ``(n,)`` with n at least 1, as spans of consecutive rows in the same order."""
    breaks = torch.nonzero(rows[1:] != rows[:-1] + 1)[:, 0] + 1
    edges = [0, *breaks.tolist(), len(rows)]
    return tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in itertools.pairwise(edges))


@dataclass(frozen=True)
class ParameterSlice:
    """The position of a module in a host's parameter: rows ``start .. stop`` of `key`.

    Args:
        key: The parameter's key in the host.
        start, stop: Range of rows, ``stop`` excluded.
        order: Permutation that the host applies to the update's rows (e.g. it swaps the halves scale and shift).
    """

    key: str
    start: int
    stop: int
    order: Spans | None = None


def split_at_common_boundaries(
    slices: Mapping[str, ParameterSlice], target_name: Callable[[str, int, int], str]
) -> KeyMap:
    """Split every slice at all boundaries of the other slices of its parameter.

    Args:
        slices: Module name -> slice, over ALL adapters to be merged.
        target_name: ``(key, start, stop)`` -> name of the target layer with these rows.

    Returns:
        The key map under which modules of different files overlap completely or not at all.

    Raises:
        MergeError: A slice with permuted rows would have to be split.
    """
    boundaries: dict[str, set[int]] = defaultdict(set)
    for part in slices.values():
        boundaries[part.key] |= {part.start, part.stop}
    key_map: dict[str, tuple[MappedRows, ...]] = {}
    for module, part in slices.items():
        cuts = sorted(b for b in boundaries[part.key] if part.start <= b <= part.stop)
        key_map[module] = tuple(
            MappedRows(target_name(part.key, start, stop), _module_rows(part, start - part.start, stop - part.start))
            for start, stop in itertools.pairwise(cuts)
        )
    return key_map


def _module_rows(part: ParameterSlice, start: int, stop: int) -> Spans | None:
    """The module's rows that become rows ``start .. stop`` of its slice; ``None`` for all in their order."""
    whole = (start, stop) == (0, part.stop - part.start)
    if part.order is None:
        return None if whole else ((start, stop),)
    if not whole:
        raise MergeError("A permuted layer cannot also be split.", module=part.key)
    return part.order


def apply_key_map(adapter: Adapter, key_map: KeyMap) -> Adapter:
    """The adapter under the key map's target names. Exact; modules that are not in the map keep their names.

    Two modules with the same target (a file with ``qkv`` AND ``to_q``) are added, as loaders do.
    """
    modules: dict[str, LowRank] = {}
    for name, part in adapter.modules.items():
        for mapped in key_map.get(name, (MappedRows(name),)):
            update = part if mapped.rows is None else part.rows(mapped.rows)
            other = modules.get(mapped.target)
            modules[mapped.target] = update if other is None else concat([other, update], [1.0, 1.0])
    diffs: dict[str, Tensor] = {}
    for name, tensor in adapter.diffs.items():
        module, _, parameter = name.rpartition(".")
        for mapped in key_map.get(module, (MappedRows(module),)):
            diff = tensor if mapped.rows is None else torch.cat([tensor[a:b] for a, b in mapped.rows])
            target = f"{mapped.target}.{parameter}"
            diffs[target] = diffs[target] + diff if target in diffs else diff
    return replace(adapter, modules=modules, diffs=diffs)


def unmapped_modules(adapters: Iterable[Adapter], key_map: KeyMap) -> list[str]:
    """Names of the adapters' modules that are not in the key map, sorted."""
    return sorted({name for adapter in adapters for name in adapter.modules} - set(key_map))
