"""Rewrite adapters under other names of the same weights: split, fuse and permute rows, exactly."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MergeError
from ..lowrank import LowRank
from .keymap import Spans
from .resolve import Position, module_rows


@dataclass(frozen=True)
class Target:
    """A name to be written, and the rows of the weight that it means.

    Args:
        name: Module name.
        start, stop: Range of rows, ``stop`` excluded.
        swapped: Whether the name means these rows with the halves exchanged.
    """

    name: str
    start: int
    stop: int
    swapped: bool = False


def regroup(adapter: Adapter, positions: Mapping[str, Position], targets: Mapping[str, Sequence[Target]]) -> Adapter:
    """The adapter with its updates under the targets' names. Exact: parts of a fused layer become blocks of its rank.

    Args:
        adapter: The adapter; each of its rows has one update.
        positions: Module -> position. Modules without one keep their name.
        targets: Key of a weight -> names that together cover all rows that the adapter changes.
    """
    sources: dict[str, list[str]] = defaultdict(list)  # key -> modules
    for name in adapter.modules:
        sources[positions[name].rows.key if name in positions else name].append(name)
    modules: dict[str, LowRank] = {}
    for key, names in sources.items():
        if names[0] not in positions:
            modules[names[0]] = adapter.modules[names[0]]
            continue
        for target in targets[key]:
            update = _update([(adapter.modules[name], positions[name]) for name in names], target)
            if update is not None:
                modules[target.name] = update
    diffs: dict[str, Tensor] = {}
    sources.clear()
    for name in adapter.diffs:
        module, _, parameter = name.rpartition(".")
        sources[f"{positions[module].rows.key}.{parameter}" if module in positions else name].append(name)
    for names in sources.values():
        module, _, parameter = names[0].rpartition(".")
        if module not in positions:
            diffs[names[0]] = adapter.diffs[names[0]]
            continue
        pieces = [(adapter.diffs[name], positions[name.rpartition(".")[0]]) for name in names]
        for target in targets[positions[module].rows.key]:
            diff = _diff(pieces, target, module)
            if diff is not None:
                diffs[f"{target.name}.{parameter}"] = diff
    unchanged = all(modules.get(name) is part for name, part in adapter.modules.items()) and list(modules) == list(
        adapter.modules
    )
    if unchanged and list(diffs) == list(adapter.diffs):
        return adapter
    return replace(adapter, modules=modules, diffs=diffs)


def _update(pieces: Sequence[tuple[LowRank, Position]], target: Target) -> LowRank | None:
    """The update of the target's rows; ``None`` if no piece changes them."""
    parts: list[tuple[LowRank, int]] = []  # rows within the target, and their first row there
    for part, position in pieces:
        start, stop = max(position.rows.start, target.start), min(position.rows.stop, target.stop)
        if start >= stop:
            continue
        spans = _rows(position, target, start, stop)
        parts.append((part if spans == ((0, part.d_out),) else part.rows(spans), start - target.start))
    if len(parts) == 1 and parts[0][0].d_out == target.stop - target.start:
        return parts[0][0]
    return _stack(parts, target.stop - target.start) if parts else None


def _rows(position: Position, target: Target, start: int, stop: int) -> Spans:
    """The module's rows that become rows ``start .. stop`` of the weight, in the order of the target."""
    if target.swapped and (start, stop) != (target.start, target.stop):
        raise MergeError("A layer with permuted rows cannot be fused.", module=target.name)
    return module_rows(position.rows, start, stop, swapped=target.swapped)


def _stack(parts: Sequence[tuple[LowRank, int]], d_out: int) -> LowRank:
    """Updates of different rows as one: of the same rank if all share `A`, else with the blocks side by side."""
    first = parts[0][0]
    if len({part.d_in for part, _ in parts}) > 1:
        raise MergeError("Parts of one layer have different widths.", found=sorted({part.d_in for part, _ in parts}))
    dtype = first.dtype if len({part.dtype for part, _ in parts}) == 1 else torch.float32
    shared = all(part.A.shape == first.A.shape and torch.equal(part.A, first.A) for part, _ in parts) and all(
        part.scale == first.scale for part, _ in parts
    )
    if shared:
        B = torch.zeros(d_out, first.rank, dtype=first.B.dtype)
        for part, start in parts:
            B[start : start + part.d_out] = part.B
        return replace(first, B=B)
    kernel = max((part.kernel for part, _ in parts), key=len)
    rank = sum(part.rank for part, _ in parts)
    if len({part.scale for part, _ in parts}) == 1:  # keeps the bits of the factors
        A = torch.cat([part.A.to(dtype) for part, _ in parts])
        B = torch.zeros(d_out, rank, dtype=dtype)
        column = 0
        for part, start in parts:
            B[start : start + part.d_out, column : column + part.rank] = part.B.to(dtype)
            column += part.rank
        alpha = None if first.alpha is None else first.scale * rank
        return LowRank(A, B, alpha, kernel)
    rows: list[Tensor] = []
    B = torch.zeros(d_out, rank)
    column = 0
    for part, start in parts:
        root = math.sqrt(abs(part.scale))
        rows.append(root * part.A.float())
        B[start : start + part.d_out, column : column + part.rank] = math.copysign(root, part.scale) * part.B.float()
        column += part.rank
    return LowRank(torch.cat(rows).to(dtype), B.to(dtype), kernel=kernel)


def _diff(pieces: Sequence[tuple[Tensor, Position]], target: Target, module: str) -> Tensor | None:
    """The change of the target's rows of a parameter, zero where no piece has one; ``None`` without any."""
    result: Tensor | None = None
    for tensor, position in pieces:
        start, stop = max(position.rows.start, target.start), min(position.rows.stop, target.stop)
        if start >= stop:
            continue
        spans = _rows(position, target, start, stop)
        if spans == ((0, position.rows.stop - position.rows.start),) and stop - start == target.stop - target.start:
            return tensor
        if tensor.ndim != 1:
            raise MergeError("A change of a whole parameter cannot be split.", module=module, found=tuple(tensor.shape))
        filled = torch.zeros(target.stop - target.start, dtype=tensor.dtype) if result is None else result
        filled[start - target.start : stop - target.start] = torch.cat([tensor[a:b] for a, b in spans])
        result = filled
    return result
