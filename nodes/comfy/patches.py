"""From ComfyUI's patches, which its LoRA loader makes of a file, to an `Adapter`. Imports nothing of ComfyUI.

A patch is a pair of a target and an update. The target is a parameter's key, ``(key, (0, start, size))`` for some of
its rows, or ``(key, offset, fn)`` where `fn` reorders the rows of the update.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ...core.adapter import Adapter, Source
from ...core.layers.keymap import KeyMap, ParameterSlice, Spans, rows_to_spans, split_at_common_boundaries
from ...core.lowrank import LowRank, fold_tucker

Target = Any  # str | tuple[str, tuple[int, int, int] | None] | tuple[str, tuple[int, int, int] | None, Callable]


def split_target(target: Target) -> tuple[str, tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None]:
    """Return a target's key, its rows ``(0, start, size)`` and its function for reordering rows."""
    if isinstance(target, str):
        return target, None, None
    key, offset, *fn = target
    return key, offset, fn[0] if fn else None


def kind_of_update(update: Any) -> str:
    """Return the usual name for a kind of update, e.g. ``LoHa``."""
    if isinstance(update, tuple):
        return "full difference"
    names = {"lora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
    return names.get(update.name) or str(update.name)


@dataclass(eq=False)
class AdapterBuilder:
    """Collects the updates of one LoRA while its patches are read.

    Args:
        label: Name of the LoRA for reports.
        convert_rank: Rank at which updates that are not low rank are approximated; 0 refuses them.
        metadata: Metadata of the file.
        source: Where the LoRA comes from.
        modules: Name of a parameter slice -> its update.
        slices: Name of a parameter slice -> the slice.
        diffs, extras: As in `Adapter`.
        dropped: Keys that cannot be used, with the reason.
        notes: Other lines for the report.
    """

    label: str
    convert_rank: int
    metadata: Mapping[str, str]
    source: Source
    modules: dict[str, LowRank] = field(default_factory=dict)
    slices: dict[str, ParameterSlice] = field(default_factory=dict)
    diffs: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, update: LowRank, rows: ParameterSlice) -> None:
        """Add a low-rank update of some rows of a parameter, under a name that only this slice has."""
        name = f"{rows.key}[{rows.start}:{rows.stop}]{'' if rows.order is None else rows.order}"
        self.modules[name], self.slices[name] = update, rows

    def build(self) -> Adapter:
        return Adapter(self.modules, self.diffs, self.extras, self.metadata, self.source, tuple(self.notes))


# Of several names that ComfyUI reads for one target its own is preferred, then the one that diffusers reads too.
_PREFERRED_PREFIXES = ("diffusion_model.", "text_encoders.", "transformer.")


class LoaderNames:
    """The module names that the stock loader reads for each target: ComfyUI's key map inverted.

    Args:
        key_map: ComfyUI's key map: module name in a file -> target.
    """

    def __init__(self, key_map: Mapping[str, Target]) -> None:
        self._names: dict[tuple[str, int, int] | str, str] = {}
        for name, target in key_map.items():
            if isinstance(target, str):
                self._offer(target, name)
            elif len(target) == 2:
                key, (_, start, size) = target
                self._offer((key, start, start + size), name)

    def _offer(self, target: tuple[str, int, int] | str, name: str) -> None:
        current = self._names.get(target)
        if current is None or _preference(name) < _preference(current):
            self._names[target] = name

    def of_parameter(self, key: str) -> str:
        """Return the name of a whole parameter; for one without a name, its key without ``.weight``."""
        return self._names.get(key, key.removesuffix(".weight"))

    def of_rows(self, key: str, start: int, stop: int) -> str | None:
        """Return the name of some rows of a parameter, ``None`` if they have none."""
        return self._names.get((key, start, stop))

    def named_rows(self, key: str) -> list[tuple[int, int]]:
        """Return all ranges of rows of a parameter that have a name."""
        return [(target[1], target[2]) for target in self._names if isinstance(target, tuple) and target[0] == key]


def _preference(name: str) -> tuple[int, int]:
    prefixes = enumerate(_PREFERRED_PREFIXES)
    rank = next((i for i, prefix in prefixes if name.startswith(prefix)), len(_PREFERRED_PREFIXES))
    return rank, len(name)


def slice_of(target: Target, d_out: int) -> ParameterSlice | None:
    """Return the rows of a parameter that an update goes to, in the order of the update's rows.

    Args:
        target: ComfyUI's target.
        d_out: Number of rows of the update.

    Returns:
        The slice, or ``None`` if the target's function does more than reorder rows, or the number of rows differs.
    """
    key, offset, fn = split_target(target)
    start = 0 if offset is None else offset[1]
    order = None if fn is None else _row_order(fn, d_out)
    if (fn is not None and order is None) or (offset is not None and (offset[0] != 0 or offset[2] != d_out)):
        return None
    return ParameterSlice(key, start, start + d_out, order)


def _row_order(fn: Callable[[Tensor], Tensor], rows: int) -> Spans | None:
    """Return how `fn` reorders rows, found by applying it to row numbers; ``None`` if it does anything else."""
    moved = fn(torch.arange(rows, dtype=torch.float64)[:, None])
    if moved.shape != (rows, 1) or not torch.equal(moved.sort(0).values[:, 0], torch.arange(rows, dtype=moved.dtype)):
        return None
    return rows_to_spans(moved[:, 0].long())


def to_low_rank(weights: tuple[Any, ...], kernel: tuple[int, ...]) -> LowRank:
    """Convert a plain LoRA patch. A Tucker core is folded into A.

    Args:
        weights: ComfyUI's ``(up, down, alpha, mid, dora_scale, reshape)``, the last two ``None``.
        kernel: Kernel size of the layer; empty for a linear one.
    """
    up, down, alpha, mid = weights[:4]
    A = down if mid is None else fold_tucker(down, mid)
    return LowRank(A.flatten(1), up.flatten(1), None if alpha is None else float(alpha), kernel)


@dataclass(frozen=True, eq=False)
class CommonNames:
    """Module names that several LoRAs of one model share.

    Args:
        key_map: Name of a parameter slice -> common names, for `core.layers.keymap.apply_key_map`.
        slices: Common name -> the slice of a parameter.
        unnamed: Those of `slices` whose rows have no name that a loader reads.
    """

    key_map: KeyMap
    slices: Mapping[str, ParameterSlice]
    unnamed: Mapping[str, ParameterSlice]


def find_common_names(
    slices: Mapping[str, ParameterSlice], names: LoaderNames, row_count: Callable[[str], int]
) -> CommonNames:
    """Find common names, by splitting fused layers where one of the LoRAs splits them, and only there.

    Args:
        slices: Name -> slice of a parameter, of all LoRAs to be merged.
        names: The names the stock loader reads.
        row_count: Returns the number of output rows of a parameter, given its key.
    """
    split_keys = {s.key for s in slices.values() if s.stop - s.start < row_count(s.key)}
    # a layer that must be split is split into rows that have names
    named = {f"{key}{span}": ParameterSlice(key, *span) for key in split_keys for span in names.named_rows(key)}
    common: dict[str, ParameterSlice] = {}
    unnamed: dict[str, ParameterSlice] = {}

    def name_of(key: str, start: int, stop: int) -> str:
        is_whole = stop - start >= row_count(key)
        name = names.of_parameter(key) if is_whole else names.of_rows(key, start, stop)
        if name is None:
            name = f"{names.of_parameter(key)}[{start}:{stop}]"
            unnamed[name] = ParameterSlice(key, start, stop)
        common[name] = ParameterSlice(key, start, stop)
        return name

    key_map = split_at_common_boundaries({**named, **slices}, name_of)
    return CommonNames({name: pieces for name, pieces in key_map.items() if name in slices}, common, unnamed)


def fuse_unnamed(adapter: Adapter, common: CommonNames, names: LoaderNames, row_count: Callable[[str], int]) -> Adapter:
    """Fuse all rows without a name into their whole parameter, with zeros elsewhere. Exact; the ranks add up.

    Args:
        adapter: The merged adapter.
        common: The names its modules have.
        names: The names the stock loader reads.
        row_count: Returns the number of output rows of a parameter, given its key.
    """
    modules = dict(adapter.modules)
    for name, rows in common.unnamed.items():
        update = modules.pop(name, None)
        if update is None:
            continue
        padding = (0, 0, rows.start, row_count(rows.key) - rows.stop)
        A, B = update.A, torch.nn.functional.pad(update.B * update.scale, padding)
        whole = names.of_parameter(rows.key)
        fused = modules.get(whole)
        if fused is not None:
            A, B = torch.cat([fused.A, A]), torch.cat([fused.B * fused.scale, B], 1)
        modules[whole] = LowRank(A, B, kernel=update.kernel)
    return replace(adapter, modules=modules)
