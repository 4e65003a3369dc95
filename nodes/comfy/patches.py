"""From ComfyUI's patches (what its own LoRA loader makes of a file) to an `Adapter`. Knows their form, not ComfyUI.

A patch is a pair of a target and what to do there. The target is a parameter's key, ``(key, (0, start, size))`` for
some of its rows, or ``(key, offset, fn)`` where `fn` reorders the update's rows.
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


def parts(target: Target) -> tuple[str, tuple[int, int, int] | None, Callable[[Tensor], Tensor] | None]:
    """A target's key, rows ``(0, start, size)`` and reordering."""
    if isinstance(target, str):
        return target, None, None
    key, offset, *fn = target
    return key, offset, fn[0] if fn else None


def kind_of(patch: Any) -> str:
    """What people call such an update."""
    if isinstance(patch, tuple):
        return "full difference"
    names = {"lora": "DoRA", "loha": "LoHa", "lokr": "LoKr", "glora": "GLoRA", "oft": "OFT", "boft": "BOFT"}
    return names.get(patch.name) or str(patch.name)


@dataclass(eq=False)
class Sites:
    """One LoRA by the places it acts on, as it is being read. Every place, a site, has a name of its own."""

    label: str
    convert_rank: int
    metadata: Mapping[str, str]
    source: Source
    modules: dict[str, LowRank] = field(default_factory=dict)
    places: dict[str, ParameterSlice] = field(default_factory=dict)
    diffs: dict[str, Tensor] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)
    dropped: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def add(self, part: LowRank, at: ParameterSlice) -> None:
        site = f"{at.key}[{at.start}:{at.stop}]{'' if at.order is None else at.order}"
        self.modules[site], self.places[site] = part, at

    def adapter(self) -> Adapter:
        return Adapter(self.modules, self.diffs, self.extras, self.metadata, self.source)


# Of several names ComfyUI reads for one target, the first of these: its own, then the one diffusers reads too.
_PREFERRED = ("diffusion_model.", "text_encoders.", "transformer.")


class Names:
    """The names the stock loader reads, per target: ComfyUI's key map turned round.

    Args:
        key_map: ComfyUI's: name in a file -> target.
    """

    def __init__(self, key_map: Mapping[str, Target]) -> None:
        self._names: dict[tuple[str, int, int] | str, str] = {}
        for name, target in key_map.items():
            if isinstance(target, str):
                self._offer(target, name)
            elif len(target) == 2:
                key, (_, start, size) = target
                self._offer((key, start, start + size), name)

    def _offer(self, at: tuple[str, int, int] | str, name: str) -> None:
        known = self._names.get(at)
        if known is None or _preference(name) < _preference(known):
            self._names[at] = name

    def whole(self, key: str) -> str:
        return self._names.get(key, key.removesuffix(".weight"))

    def rows(self, key: str, start: int, stop: int) -> str | None:
        return self._names.get((key, start, stop))

    def slices(self, key: str) -> list[tuple[int, int]]:
        """All row ranges of a key that have a name of their own."""
        return [(at[1], at[2]) for at in self._names if isinstance(at, tuple) and at[0] == key]


def _preference(name: str) -> tuple[int, int]:
    rank = next((i for i, prefix in enumerate(_PREFERRED) if name.startswith(prefix)), len(_PREFERRED))
    return rank, len(name)


def place(target: Target, d_out: int) -> ParameterSlice | None:
    """Where a target's update goes. ``None``: its `fn` is not a reordering of rows.

    Args:
        target: ComfyUI's.
        d_out: Rows of the update.
    """
    key, offset, fn = parts(target)
    start = 0 if offset is None else offset[1]
    order = None if fn is None else _order(fn, d_out)
    if (fn is not None and order is None) or (offset is not None and (offset[0] != 0 or offset[2] != d_out)):
        return None
    return ParameterSlice(key, start, start + d_out, order)


def _order(fn: Callable[[Tensor], Tensor], rows: int) -> Spans | None:
    """What `fn` does to rows, found by letting it reorder row numbers; ``None`` if it does anything else."""
    moved = fn(torch.arange(rows, dtype=torch.float64)[:, None])
    if moved.shape != (rows, 1) or not torch.equal(moved.sort(0).values[:, 0], torch.arange(rows, dtype=moved.dtype)):
        return None
    return rows_to_spans(moved[:, 0].long())


def low_rank(weights: tuple[Any, ...], kernel: tuple[int, ...]) -> LowRank:
    """A plain LoRA patch as `LowRank`. Tucker's mid matrix is folded into A.

    Args:
        weights: ComfyUI's ``(up, down, alpha, mid, dora_scale, reshape)``, the last two ``None``.
        kernel: Of the layer it goes to.
    """
    up, down, alpha, mid = weights[:4]
    A = down if mid is None else fold_tucker(down, mid)
    return LowRank(A.flatten(1), up.flatten(1), None if alpha is None else float(alpha), kernel)


@dataclass(frozen=True, eq=False)
class Common:
    """Module names under which several LoRAs of one model line up, all of them read by the stock loader.

    Args:
        key_map: For `core.layers.keymap.apply_key_map`.
        places: The common names -> where they are.
        unnamed: Those of our own making among them, for row ranges that no loader has a name for.
    """

    key_map: KeyMap
    places: Mapping[str, ParameterSlice]
    unnamed: Mapping[str, ParameterSlice]


def common_names(places: Mapping[str, ParameterSlice], names: Names, rows: Callable[[str], int]) -> Common:
    """Cut fused layers where another LoRA splits them, and only there.

    Args:
        places: Site -> place, over all LoRAs to be merged.
        names: What the stock loader reads.
        rows: Output rows of a layer's key.
    """
    cut = {p.key for p in places.values() if p.stop - p.start < rows(p.key)}
    # once a layer is cut, cut it into ranges that have names
    named = {f"{key}{span}": ParameterSlice(key, *span) for key in cut for span in names.slices(key)}
    known: dict[str, ParameterSlice] = {}
    unnamed: dict[str, ParameterSlice] = {}

    def leaf(key: str, start: int, stop: int) -> str:
        whole = stop - start >= rows(key)
        name = names.whole(key) if whole else names.rows(key, start, stop)
        if name is None:
            name = f"{names.whole(key)}[{start}:{stop}]"
            unnamed[name] = ParameterSlice(key, start, stop)
        known[name] = ParameterSlice(key, start, stop)
        return name

    key_map = split_at_common_boundaries({**named, **places}, leaf)
    return Common({site: pieces for site, pieces in key_map.items() if site in places}, known, unnamed)


def fuse_unnamed(adapter: Adapter, common: Common, names: Names, rows: Callable[[str], int]) -> Adapter:
    """Fold every piece no loader has a name for into its whole layer, zeros elsewhere. Exact; ranks add up.

    Args:
        adapter: The merged one.
        rows: Output rows of a layer's key.
    """
    modules = dict(adapter.modules)
    for name, at in common.unnamed.items():
        part = modules.pop(name, None)
        if part is None:
            continue
        B = torch.nn.functional.pad(part.B * part.scale, (0, 0, at.start, rows(at.key) - at.stop))
        whole = names.whole(at.key)
        known = modules.get(whole)
        A = part.A
        if known is not None:
            A, B = torch.cat([known.A, A]), torch.cat([known.B * known.scale, B], 1)
        modules[whole] = LowRank(A, B, kernel=part.kernel)
    return replace(adapter, modules=modules)
