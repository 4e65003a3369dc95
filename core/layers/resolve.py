"""Which weight each module of a LoRA changes: the family of its base model, and rows of canonical weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise

import torch

from ..adapter import Adapter, base_model
from ..errors import MergeError, name_some
from ..lowrank import LowRank, concat
from .families import FAMILIES, Family
from .families.table import Component, Part
from .keymap import ParameterSlice, Spans

_SAME = 1e-2  # relative distance of two updates that are copies, one of them perhaps rounded to 8 bits of mantissa


@dataclass(frozen=True)
class Position:
    """The weight that a module changes.

    Args:
        component: The network.
        path: Canonical path of the weight in it.
        rows: The weight's key and the rows that the module changes.
        total: Number of rows of the weight.
    """

    component: Component
    path: str
    rows: ParameterSlice
    total: int


@dataclass(frozen=True)
class Resolution:
    """The family of some adapters, and where their modules lie.

    Args:
        family: The family.
        others: Families that the names and sizes fit as well.
        positions: Module -> position; names that the family does not know are missing.
        unknown: Those names.
    """

    family: Family
    others: tuple[Family, ...]
    positions: Mapping[str, Position]
    unknown: tuple[str, ...]

    @property
    def families(self) -> tuple[Family, ...]:
        return (self.family, *self.others)


@dataclass(frozen=True)
class _Size:
    d_out: int
    d_in: int | None  # ``None`` where only a bias or norm is changed


def resolve(adapters: Sequence[Adapter], among: Sequence[Family] = FAMILIES) -> Resolution | None:
    """The family of adapters that are for one base model, and the position of each of their modules.

    Families are compared by the number of names that they know; then by sizes, spellings, words in the metadata and
    numbers of blocks; then by their order in `FAMILIES`.

    Args:
        adapters: LoRAs of one base model.
        among: The families to choose from.

    Returns:
        ``None`` if no family knows any of the names.

    Raises:
        MergeError: The adapters are for models of different families, or disagree on the size of a weight.
    """
    sizes: dict[str, _Size] = {}
    for adapter in adapters:
        for name, size in _sizes(adapter):
            sizes.setdefault(name, size)
    found: dict[Family, dict[str, tuple[Component, str, Part]]] = {}
    for name in sizes:
        for family, hit in _hits(name):
            if family in among:
                found.setdefault(family, {})[name] = hit
    if not found:
        return None
    common = {family: hits for family, hits in found.items() if all(_knows(hits, adapter) for adapter in adapters)}
    if not common:
        if any(not any(_knows(hits, adapter) for hits in found.values()) for adapter in adapters):
            return None  # an adapter of an unknown family: only its own names can tell
        raise _strangers(adapters, found)
    hints = [text.lower() for adapter in adapters if (text := base_model(adapter.metadata)) is not None]
    most = max(len(hits) for hits in common.values())
    common = {family: hits for family, hits in common.items() if len(hits) == most}
    scores = {
        family: (
            *_evidence(family, hits, sizes),
            sum(spells(component, name, path) for name, (component, path, _) in hits.items()),
            _hinted(family, hints),
            _depth(family, hits),
        )
        for family, hits in common.items()
    }
    best = max(scores.values())
    fitting = [family for family in FAMILIES if family in scores and scores[family] == best]
    family = fitting[0]
    positions = {
        name: _position(component, path, part, sizes[name], name)
        for name, (component, path, part) in common[family].items()
    }
    _check_totals(positions)
    return Resolution(family, tuple(fitting[1:]), positions, tuple(sorted(set(sizes) - set(positions))))


@lru_cache(maxsize=1 << 16)
def _hits(name: str) -> tuple[tuple[Family, tuple[Component, str, Part]], ...]:
    """The families that know a name, and what it means there."""
    return tuple((family, hit) for family in FAMILIES if (hit := family.find(name)) is not None)


def _sizes(adapter: Adapter) -> Iterator[tuple[str, _Size]]:
    for name, part in adapter.modules.items():
        yield name, _Size(part.d_out, part.d_in)
    for name, tensor in adapter.diffs.items():
        module, _, parameter = name.rpartition(".")
        if module not in adapter.modules:
            has_rows = tensor.ndim == 1 or (parameter == "weight" and tensor.ndim > 0)
            yield module, _Size(tensor.shape[0] if has_rows else 1, None)


def _knows(hits: Mapping[str, object], adapter: Adapter) -> bool:
    return not adapter.layers or any(name in hits for name in adapter.layers)


def _strangers(adapters: Sequence[Adapter], found: Mapping[Family, Mapping[str, object]]) -> MergeError:
    rows = [
        f"{adapter.label}: {name_some([family.name for family, hits in found.items() if _knows(hits, adapter)], 4)}, "
        f"names such as {name_some(adapter.layers, 2)}"
        for adapter in adapters
    ]
    return MergeError(
        "The LoRAs have no layer in common: they are for models of different families.",
        file=" and ".join(adapter.source.path or adapter.label for adapter in adapters[:4]),
        expected="LoRAs of the same base model",
        found="; ".join(rows[:4]),
        remedy="check that all are for the same base model",
    )


def spells(component: Component, name: str, path: str) -> bool:
    """Whether any dialect of the component spells the layer exactly so."""
    return any(
        name.startswith(dialect.prefix)
        and any(dialect.spell(slot.path) == name for slot in component.slots(dialect.naming, path))
        for dialect in component.dialects
    )


_FamilyHits = Mapping[str, tuple[Component, str, Part]]


def _evidence(family: Family, hits: _FamilyHits, sizes: Mapping[str, _Size]) -> tuple[int, int]:
    """Minus the number of layers whose size contradicts the family, and the number of those that confirm it."""
    against = confirming = 0
    for name, (component, path, part) in hits.items():
        size = sizes[name]
        if size.d_out % part.share:
            against += 1
        if component is not family.model or size.d_in is None:
            continue
        ratio = family.ratios.get(_template(path))
        if ratio is not None:
            rows = size.d_out * sum(part.shares) / part.share
            against, confirming = _count(abs(rows - ratio * size.d_in) < 1e-3 * rows, against, confirming)
        for ending, widths in family.widths.items():
            if path.endswith(ending):
                confirming += size.d_in in widths
    return -against, confirming


def _count(holds: bool, against: int, confirming: int) -> tuple[int, int]:
    return (against, confirming + 1) if holds else (against + 1, confirming)


def _template(path: str) -> str:
    # numbers of blocks only, as in the tables of ratios: img_mlp.0 keeps its own
    words = path.split(".")
    return ".".join("#" if word.isdigit() and i == 1 else word for i, word in enumerate(words))


def _hinted(family: Family, hints: Sequence[str]) -> int:
    return max((len(word) for word in family.hints for hint in hints if word in hint), default=0)


def _depth(family: Family, hits: _FamilyHits) -> int:
    """1 if the highest number of any kind of blocks is the family's, -1 if one is higher."""
    highest: dict[str, int] = defaultdict(lambda: -1)
    for component, path, _ in hits.values():
        block, _, rest = path.partition(".")
        number = rest.partition(".")[0]
        if component is family.model and number.isdigit():
            highest[block] = max(highest[block], int(number))
    differences = [highest[block] + 1 - count for block, count in family.depth.items() if block in highest]
    return -1 if any(difference > 0 for difference in differences) else int(0 in differences)


def _position(component: Component, path: str, part: Part, size: _Size, name: str) -> Position:
    unit, rest = divmod(size.d_out, part.share)
    if rest:
        raise MergeError(
            "A layer's size does not fit the model that its name belongs to.",
            module=name,
            expected=f"a multiple of {part.share} rows",
            found=size.d_out,
        )
    start = part.before * unit
    order: Spans | None = None
    if part.swapped or (part.swapped is None and size.d_in is not None and size.d_out == 2 * size.d_in):
        half = size.d_out // 2
        order = ((half, size.d_out), (0, half))
    rows = ParameterSlice(component.root + path, start, start + size.d_out, order)
    return Position(component, path, rows, sum(part.shares) * unit)


def _check_totals(positions: Mapping[str, Position]) -> None:
    first: dict[str, tuple[str, int]] = {}
    for name, position in positions.items():
        other, total = first.setdefault(position.rows.key, (name, position.total))
        if total != position.total:
            raise MergeError(
                "The LoRAs are for different base models.",
                module=f"{other} and {name}",
                expected=f"the same number of rows in {position.rows.key}",
                found=f"{total} and {position.total}",
                remedy="merge only LoRAs trained for the same base model",
            )


# --- files that hold one layer twice ----------------------------------------------------------------------------------


def without_copies(adapter: Adapter, resolution: Resolution) -> tuple[Adapter, list[str]]:
    """The adapter without second copies of layers under other names, and the names left out.

    Some programs write every attention layer twice, fused and split, so that more programs can read the file.

    Raises:
        MergeError: Two updates of the same rows that are not copies of each other.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in adapter.modules:
        if name in resolution.positions:
            groups[resolution.positions[name].rows.key].append(name)
    dropped: list[str] = []
    for names in groups.values():
        # widest first, so that a fused layer is compared with its parts
        names.sort(key=lambda name: -adapter.modules[name].d_out)
        while names:
            wide = resolution.positions[names[0]].rows
            copies = [
                name
                for name in names[1:]
                if max(wide.start, resolution.positions[name].rows.start)
                < min(wide.stop, resolution.positions[name].rows.stop)
            ]
            for name in copies:
                _check_copy(adapter, names[0], name, resolution)
            parts = sum(adapter.modules[name].d_out for name in copies)
            # the parts have the smaller ranks, but there may be parts of some rows only
            complete = parts == wide.stop - wide.start and len(copies) > 1
            dropped += names[:1] if complete else copies
            names[:] = names[1:] if complete else [name for name in names[1:] if name not in copies]
    if not dropped:
        return adapter, []
    kept = {name: part for name, part in adapter.modules.items() if name not in dropped}
    diffs = {name: tensor for name, tensor in adapter.diffs.items() if name.rpartition(".")[0] not in dropped}
    return replace(adapter, modules=kept, diffs=diffs), sorted(dropped)


def copies(adapters: Sequence[Adapter]) -> list[str]:
    """Notes on adapters that hold layers twice, under two names."""
    notes: list[str] = []
    for adapter in adapters:
        resolution = resolve([adapter])
        dropped = [] if resolution is None else without_copies(adapter, resolution)[1]
        if dropped:
            notes.append(
                f"{adapter.label} holds {len(dropped)} layers a second time under other names; counted once: "
                f"{name_some(dropped)}"
            )
    return notes


def _check_copy(adapter: Adapter, wide_name: str, name: str, resolution: Resolution) -> None:
    wide, part = resolution.positions[wide_name].rows, resolution.positions[name].rows
    start, stop = max(wide.start, part.start), min(wide.stop, part.stop)
    one = adapter.modules[wide_name].rows(module_rows(wide, start, stop))
    other = adapter.modules[name].rows(module_rows(part, start, stop))
    scale = max(_norm(one), _norm(other))
    if _norm(concat([one, other], [1.0, -1.0])) > _SAME * scale:
        raise MergeError(
            "The file holds two different updates of one layer, under two names.",
            file=adapter.source.path or adapter.label,
            module=f"{wide_name} and {name}",
            expected="each layer once, or equal copies",
            remedy="remove one of them from the file, or export the LoRA again",
        )


def _norm(part: LowRank) -> float:
    """Frobenius norm of the update, without forming it."""
    A, B = part.A.double(), part.scale * part.B.double()
    return float(((B.mT @ B) * (A @ A.mT)).sum().clamp(min=0).sqrt())


def module_rows(part: ParameterSlice, start: int, stop: int, *, swapped: bool = False) -> Spans:
    """The module's rows that become rows ``start .. stop`` of the parameter; with `swapped`, halves exchanged."""
    rows = torch.arange(part.stop - part.start)
    if part.order is not None:
        rows = torch.cat([rows[a:b] for a, b in part.order])
    rows = rows[start - part.start : stop - part.start]
    if swapped:
        rows = torch.cat([rows[len(rows) // 2 :], rows[: len(rows) // 2]])
    breaks = (torch.nonzero(rows[1:] != rows[:-1] + 1)[:, 0] + 1).tolist()
    return tuple((int(rows[a]), int(rows[b - 1]) + 1) for a, b in pairwise([0, *breaks, len(rows)]))
