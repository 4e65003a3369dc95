"""Derive key maps from diffusers' own converters, by running them on probes instead of weights.

The `up` factors of a probe number the rows of all modules, its `down` factors number the modules. The converter's
output then shows which rows of which module make up each target. So every renaming, split and permutation that
diffusers knows becomes exact plain data (a `KeyMap`), for any rank and any values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.formats.suffixes import classify
from ...core.layers.keymap import MappedRows, Spans, rows_to_spans

# (suffix of down, suffix of up, whether there is an alpha): converters of different models accept different ones
_STYLES = (("lora_A", "lora_B", False), ("lora_down", "lora_up", True), ("lora_down", "lora_up", False))
_MAX_SPANS = 64  # a target of more spans is not a sensible permutation

RowCounts = Mapping[str, int]  # module -> number of output rows
Converter = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@dataclass(frozen=True)
class Probe:
    """Values that identify every row of every module: module i holds ``starts[i] .. starts[i + 1]``.

    Args:
        names: Module names.
        starts: int64 ``(len(names) + 1,)``, the first value is 1.
    """

    names: tuple[str, ...]
    starts: Tensor

    @staticmethod
    def of(rows: RowCounts) -> Probe:
        counts = torch.tensor([0, *rows.values()])
        return Probe(tuple(rows), counts.cumsum(0) + 1)  # no zeros: loaders drop factors that are all zero

    def up(self, index: int) -> Tensor:
        """The up factor of module `index`: ``(d_out, 1)`` float64, exact up to 2^53."""
        return torch.arange(int(self.starts[index]), int(self.starts[index + 1]), dtype=torch.float64)[:, None]

    def down(self, index: int) -> Tensor:
        """The down factor of module `index`: ``(1, 3)`` float64, which shows any change of the input side."""
        return torch.tensor([[index + 1.0, -(index + 1.0), 7.0]], dtype=torch.float64)

    def decode(self, up: Tensor) -> tuple[int, Spans] | None:
        """Index of the module and its rows in a converted `up`; ``None`` unless it consists of rows of one module."""
        if up.ndim != 2 or up.shape[1] != 1 or not up.numel():
            return None
        values = up[:, 0].double()
        numbers = values.long()
        if not bool((numbers == values).all()) or int(numbers.min()) < 1 or int(numbers.max()) >= int(self.starts[-1]):
            return None
        index = int(torch.searchsorted(self.starts, numbers[:1], right=True)) - 1
        start, stop = int(self.starts[index]), int(self.starts[index + 1])
        if int(numbers.min()) < start or int(numbers.max()) >= stop:
            return None
        spans = rows_to_spans(numbers - start)
        return (index, spans) if len(spans) <= _MAX_SPANS else None


def probe_converter(
    rows: RowCounts, converter: Converter, spell: Callable[[str], str], is_target: Callable[[str], bool]
) -> dict[str, tuple[MappedRows, ...]]:
    """The key map of a converter. Modules that it refuses or changes in value are not in the map.

    If the converter refuses all modules together, it is run on halves of them, so that a bad key costs only itself.

    Args:
        rows: The modules.
        converter: From a LoRA's state dict to one under other names.
        spell: The spelling of a module name that the converter expects.
        is_target: Whether a converted name is one of the target dialect.
    """
    if not rows:
        return {}
    best: dict[str, tuple[MappedRows, ...]] = {}
    for style in _STYLES:
        try:
            key_map = _probe(rows, converter, spell, style, is_target)
        except Exception:  # converters raise anything on keys that they do not expect
            continue
        if len(key_map) > len(best):
            best = key_map
        if len(best) == len(rows):
            return best
    if not best and len(rows) > 1:
        names = list(rows)
        for half in (names[: len(names) // 2], names[len(names) // 2 :]):
            best.update(probe_converter({name: rows[name] for name in half}, converter, spell, is_target))
    return best


def _probe(
    rows: RowCounts,
    converter: Converter,
    spell: Callable[[str], str],
    style: tuple[str, str, bool],
    is_target: Callable[[str], bool],
) -> dict[str, tuple[MappedRows, ...]]:
    """The key map of a converter, from one run on all modules with keys of one style."""
    probe = Probe.of(rows)
    down, up, alpha = style
    state: dict[str, Tensor] = {}
    for index, name in enumerate(probe.names):
        spelled = spell(name)
        if ".processor." in spelled:
            state[f"{spelled}.down.weight"], state[f"{spelled}.up.weight"] = probe.down(index), probe.up(index)
            continue
        state[f"{spelled}.{down}.weight"], state[f"{spelled}.{up}.weight"] = probe.down(index), probe.up(index)
        if alpha:
            state[f"{spelled}.alpha"] = torch.tensor(1.0, dtype=torch.float64)
    converted = converter(state)
    targets: dict[str, tuple[int, Spans]] = {}
    for module, keys in classify(converted)[0].items():
        if module.startswith("diffusion_model.") or not {"down", "up"} <= set(keys):
            continue  # the converter left it as it was
        # converters leave some layers outside of blocks without the component's prefix; the loader then ignores them
        target = module if is_target(module) or module.startswith("lora_") else f"transformer.{module}"
        if not is_target(target):
            continue
        decoded = probe.decode(converted[keys["up"]])
        if decoded is not None and torch.equal(converted[keys["down"]].double(), probe.down(decoded[0])):
            targets[target] = decoded
    return complete_modules(probe, rows, targets)


def complete_modules(
    probe: Probe, rows: RowCounts, targets: Mapping[str, tuple[int, Spans]]
) -> dict[str, tuple[MappedRows, ...]]:
    """The key map of the modules all of whose rows occur exactly once in the targets.

    Args:
        probe: The probe of the modules.
        rows: The modules.
        targets: Target -> index of the module and its rows, as from `Probe.decode`.
    """
    by_module: dict[str, list[tuple[str, Spans]]] = {}
    for target, (index, spans) in targets.items():
        by_module.setdefault(probe.names[index], []).append((target, spans))
    return {
        name: tuple(MappedRows(target, None if spans == ((0, rows[name]),) else spans) for target, spans in mapped)
        for name, mapped in by_module.items()
        if _covers([span for _, spans in mapped for span in spans], rows[name])
    }


def _covers(spans: Iterable[tuple[int, int]], count: int) -> bool:
    """Whether the spans contain each of the rows ``0 .. count`` exactly once."""
    position = 0
    for start, stop in sorted(spans):
        if start != position:
            return False
        position = stop
    return position == count
