"""Names by reader: module names that a program reads, for the layers that an adapter changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from ..adapter import Adapter
from ..errors import SaveError, name_some
from .families import FAMILIES, Family
from .families.table import WHOLE, Component, Dialect, Reader
from .regroup import Target, regroup
from .resolve import Position, Resolution, resolve, without_copies

# Tensors that are not added but set a parameter or its shape: suffix -> the same in ComfyUI's words.
_SETTINGS = {".set_weight": ".set_weight", ".reshape_weight": ".reshape_weight", ".scale": ".set_weight"}


@dataclass(frozen=True)
class Weight:
    """A weight that adapters change.

    Args:
        component, path: Its canonical name.
        total: Number of rows.
        d_in: Number of columns; ``None`` where only biases and norms are changed.
        pieces: The ranges of rows that the adapters' modules change, split at all boundaries.
        has_bias: Whether its bias is changed as well.
    """

    component: Component
    path: str
    total: int
    d_in: int | None
    pieces: tuple[tuple[int, int], ...]
    has_bias: bool

    @property
    def key(self) -> str:
        return self.component.root + self.path


def weights_of(adapters: Sequence[Adapter], positions: Mapping[str, Position]) -> list[Weight]:
    """The weights that the adapters change, in the order of their modules."""
    at: dict[str, Position] = {}
    edges: dict[str, set[int]] = defaultdict(set)
    ranges: dict[str, set[tuple[int, int]]] = defaultdict(set)
    widths: dict[str, int] = {}
    biases: set[str] = set()
    for adapter in adapters:
        for name in adapter.layers:
            if name not in positions:
                continue
            position = positions[name]
            key = position.rows.key
            at.setdefault(key, position)
            edges[key] |= {position.rows.start, position.rows.stop}
            ranges[key].add((position.rows.start, position.rows.stop))
            if name in adapter.modules:
                widths[key] = adapter.modules[name].d_in
            if f"{name}.bias" in adapter.diffs:
                biases.add(key)
    result: list[Weight] = []
    for key, position in at.items():
        pieces = tuple(
            (a, b)
            for a, b in pairwise(sorted(edges[key]))
            if any(start <= a and b <= stop for start, stop in ranges[key])
        )
        total = position.total
        result.append(Weight(position.component, position.path, total, widths.get(key), pieces, key in biases))
    return result


def targets_in(dialect: Dialect, weight: Weight, reader: Reader | None = None) -> list[Target]:
    """The dialect's names for a weight that the reader reads; any reader with ``None``."""
    result: list[Target] = []
    for slot in weight.component.slots(dialect.naming, weight.path):
        unit, rest = divmod(weight.total, sum(slot.part.shares))
        if rest:
            continue
        start = slot.part.before * unit
        stop = start + slot.part.share * unit
        swapped = slot.part.swapped
        if swapped is None:
            swapped = weight.d_in is not None and stop - start == 2 * weight.d_in
        part_only = (start, stop) != (0, weight.total)
        # ComfyUI adds no bias under the name of a part or of permuted rows
        if reader == "comfy" and (not slot.comfy or (weight.has_bias and (part_only or swapped))):
            continue
        result.append(Target(dialect.spell(slot.path), start, stop, swapped))
    return sorted(result, key=lambda target: target.start)


def fits(targets: Sequence[Target], weight: Weight) -> bool:
    """Whether each piece of the weight has its own name."""
    ranges = {(target.start, target.stop) for target in targets}
    return all(piece in ranges for piece in weight.pieces)


def covers(targets: Sequence[Target], weight: Weight) -> bool:
    """Whether all changed rows of the weight have a name."""
    return all(sum(max(0, min(t.stop, b) - max(t.start, a)) for t in targets) == b - a for a, b in weight.pieces)


def dialect_of(component: Component, names: Sequence[str], positions: Mapping[str, Position]) -> Dialect | None:
    """The dialect that spells most of the names as they are; ``None`` if none spells any so."""
    mine = [(name, positions[name]) for name in names if name in positions and positions[name].component is component]
    counts = {
        dialect: sum(
            any(dialect.spell(slot.path) == name for slot in component.slots(dialect.naming, position.path))
            for name, position in mine
        )
        for dialect in component.dialects
    }
    best = max(counts, key=lambda dialect: counts[dialect])
    return best if counts[best] else None


def rename_for(
    adapter: Adapter,
    reader: Reader,
    *,
    among: Sequence[Family] = FAMILIES,
    accepts: Callable[[str], bool] = lambda name: True,
    strict: bool = True,
) -> Adapter | None:
    """The adapter under names that the reader reads; ``None`` if its family is unknown.

    The adapter's own dialect is kept if the reader reads it. Layers that the reader knows in parts are split, parts
    that it knows as one layer are fused: exactly, but the rank of a fused layer is the sum of its parts' ranks.

    Args:
        adapter: Any adapter.
        reader: The program that shall read its file.
        among: The families that it may belong to.
        accepts: Whether the file's format can store a name.
        strict: Raise for layers that the family does not know; ``False`` keeps their names.

    Raises:
        SaveError: The reader has no name for some layers.
        MergeError: See `resolve`.
    """
    resolution = resolve([adapter], among)
    if resolution is None:
        return None
    adapter, _ = without_copies(adapter, resolution)
    return _renamed(adapter, resolution, reader, accepts, strict)


def _renamed(
    adapter: Adapter, resolution: Resolution, reader: Reader, accepts: Callable[[str], bool], strict: bool
) -> Adapter:
    unnamed = [*resolution.unknown] if strict else []
    weights = weights_of([adapter], resolution.positions)
    targets: dict[str, list[Target]] = {}
    for component in dict.fromkeys(weight.component for weight in weights):
        mine = [weight for weight in weights if weight.component is component]
        own = dialect_of(component, adapter.layers, resolution.positions)
        # PEFT's names are those of diffusers' models
        program = "diffusers" if reader == "peft" else reader
        readable = [dialect for dialect in component.dialects if program in dialect.readers]
        readable.sort(key=lambda dialect: dialect != own)
        tables = [[[t for t in targets_in(d, weight, reader) if accepts(t.name)] for weight in mine] for d in readable]
        chosen = _choose([_safe(table, mine, reader, resolution) for table in tables], mine)
        if not all(chosen):
            # where no name is right in all families that it may be, its own name is
            kept = [[[t for t in rows if t.name in adapter.layers] for rows in table] for table in tables]
            chosen = [rows or other for rows, other in zip(chosen, _choose(kept, mine), strict=True)]
        targets |= {weight.key: rows for weight, rows in zip(mine, chosen, strict=True)}
    unnamed += [
        name
        for name in adapter.layers
        if name in resolution.positions and not targets[resolution.positions[name].rows.key]
    ]
    if unnamed:
        raise _no_names(adapter, resolution, reader, unnamed)
    if reader == "peft":
        targets = _without_component_prefix(adapter, targets)
    return regroup(_with_settings(adapter, resolution, reader), resolution.positions, targets)


def _no_names(adapter: Adapter, resolution: Resolution, reader: Reader, names: Sequence[str]) -> SaveError:
    return SaveError(
        f"{_PROGRAMS[reader]} has no names for some layers of this LoRA, or none that are known here.",
        file=adapter.source.path or None,
        module=name_some(sorted(set(names)), 3),
        expected=f"layers of the family {' or '.join(family.name for family in resolution.families)}",
        found=f"{len(set(names))} of {len(adapter.layers)} layers without a name",
        remedy="save it for another program, or without one, which keeps the names of the inputs; or leave these "
        f"layers out: --module-weight '{min(names)}=0'",
    )


_PROGRAMS: Mapping[Reader, str] = {
    "comfy": "ComfyUI", "diffusers": "diffusers", "kohya": "kohya's tools", "peft": "PEFT"
}  # fmt: skip


_Table = Sequence[list[Target]]  # names of each weight


def _choose(tables: Sequence[_Table], weights: Sequence[Weight]) -> list[list[Target]]:
    """Names for each weight: of the first dialect that names every piece, else of the first that covers all rows.

    Where no dialect has names for all weights, each weight is named by the first that has some for it; a weight without
    names has an empty list.
    """
    for suits in (fits, covers):
        for table in tables:
            if all(suits(targets, weight) for targets, weight in zip(table, weights, strict=True)):
                return list(table)
    result: list[list[Target]] = []
    for i, weight in enumerate(weights):
        rows = [table[i] for table in tables]
        suitable = [row for suits in (fits, covers) for row in rows if suits(row, weight)]
        result.append(suitable[0] if suitable else [])
    return result


def _safe(table: _Table, weights: Sequence[Weight], reader: Reader, resolution: Resolution) -> _Table:
    """The names that are right in all families that the adapter may belong to."""
    if reader == "kohya" or not resolution.others:
        return table
    agrees = _reads if reader == "comfy" else _names_alike
    return [
        [target for target in rows if all(agrees(family, weight, target) for family in resolution.others)]
        for rows, weight in zip(table, weights, strict=True)
    ]


def _reads(family: Family, weight: Weight, target: Target) -> bool:
    """Whether ComfyUI reads a name as the same rows in this family."""
    hit = family.find(target.name)
    if hit is None or hit[1] != weight.path:
        return False
    component = hit[0]
    own = replace(weight, component=component)
    return any(
        target in targets_in(dialect, own, "comfy") for dialect in component.dialects if "comfy" in dialect.readers
    )


def _names_alike(family: Family, weight: Weight, target: Target) -> bool:
    """Whether diffusers has no other name for the same weight in this family."""
    for component in family.components:
        if component.root == weight.component.root and component.find(weight.path) == (weight.path, WHOLE):
            own = replace(weight, component=component)
            rows = [t for d in component.dialects if "diffusers" in d.readers for t in targets_in(d, own)]
            return not rows or target in rows
    return True


def _without_component_prefix(adapter: Adapter, targets: Mapping[str, list[Target]]) -> dict[str, list[Target]]:
    """Names within one model, as PEFT has them."""
    prefixes = {target.name.partition(".")[0] for rows in targets.values() for target in rows}
    if len(prefixes) > 1:
        raise SaveError(
            "A PEFT adapter belongs to one model, and this LoRA changes several.",
            file=adapter.source.path or None,
            found=", ".join(sorted(prefixes)),
            remedy="save it for another program, or leave one out with a weight of 0",
        )
    return {
        key: [replace(target, name=target.name.partition(".")[2]) for target in rows] for key, rows in targets.items()
    }


# --- tensors that set parameters --------------------------------------------------------------------------------------


def _with_settings(adapter: Adapter, resolution: Resolution, reader: Reader) -> Adapter:
    """The adapter with its settings of parameters under names that the reader reads.

    Raises:
        SaveError: The reader reads no such settings under the names of the layers.
    """
    hits = {
        key: hit
        for key in adapter.extras
        for suffix in _SETTINGS
        if key.endswith(suffix) and (hit := resolution.family.find(key.removesuffix(suffix))) is not None
    }
    if not hits:
        return adapter
    if reader != "comfy":
        raise SaveError(
            f"This LoRA sets parameters of the model, under names that {_PROGRAMS[reader]} is not known to read.",
            file=adapter.source.path or None,
            module=name_some(sorted(hits), 3),
            remedy="save it for ComfyUI",
        )
    extras = {key: tensor for key, tensor in adapter.extras.items() if key not in hits}
    for key, (component, path, _) in hits.items():
        suffix = next(suffix for suffix in _SETTINGS if key.endswith(suffix))
        extras[component.root + path + _SETTINGS[suffix]] = adapter.extras[key]
    reshaped = "diffusion_model.img_in.reshape_weight"  # control LoRAs have a wider input than their base model
    if any(key.endswith("_norm.scale") for key in hits) and reshaped not in extras:
        for name, position in resolution.positions.items():
            if position.rows.key == "diffusion_model.img_in" and name in adapter.modules:
                part = adapter.modules[name]
                extras[reshaped] = torch.tensor([part.d_out, part.d_in])
    return adapter if extras.keys() == adapter.extras.keys() else replace(adapter, extras=extras)
