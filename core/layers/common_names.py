"""One name for each layer of a known family, in several adapters."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch.nn import functional as F

from ..adapter import Adapter
from .families.table import Component, Dialect
from .keymap import MappedRows, apply_key_map
from .readers import Weight, fits, targets_in, weights_of
from .regroup import Target, regroup
from .resolve import Position, Resolution, without_copies

_MODEL_ROOT = "diffusion_model."
_NATIVE_PREFIXES = ("diffusion_model.", "lora_unet_")
_IMAGE_INPUT = "diffusion_model.img_in"


def align_family(adapters: Sequence[Adapter], resolution: Resolution) -> list[Adapter]:
    """The adapters with one name for each layer or part of a layer; unchanged where they agree already.

    Raises:
        MergeError: A file that holds two different updates of one layer.
    """
    adapters = [without_copies(adapter, resolution)[0] for adapter in adapters]
    adapters = _widen_image_input(adapters, resolution)
    positions = resolution.positions
    weights = weights_of(adapters, positions)
    targets: dict[str, list[Target]] = {}
    like_diffusers = False
    for component in sorted({weight.component: None for weight in weights}, key=lambda c: c.root != _MODEL_ROOT):
        mine = [weight for weight in weights if weight.component is component]
        chosen = _own_names(adapters, positions, mine)
        if chosen is None:
            chosen, dialect = _common_names(component, mine, like_diffusers)
            like_diffusers = dialect is not None and "diffusers" in dialect.readers
        targets |= {weight.key: rows for weight, rows in zip(mine, chosen, strict=True)}
    renamed = [regroup(adapter, positions, targets) for adapter in adapters]
    return _unify_unknown(renamed, resolution.unknown)


def _own_names(
    adapters: Sequence[Adapter], positions: Mapping[str, Position], weights: Sequence[Weight]
) -> list[list[Target]] | None:
    """The names that the adapters have, if each piece of each weight has one; else ``None``."""
    names: dict[str, dict[str, Target]] = defaultdict(dict)
    for adapter in adapters:
        for name in adapter.layers:
            if name in positions:
                rows = positions[name].rows
                names[rows.key][name] = Target(name, rows.start, rows.stop, rows.order is not None)
    result = [list(names[weight.key].values()) for weight in weights]
    for weight, rows in zip(weights, result, strict=True):
        if sorted((target.start, target.stop) for target in rows) != list(weight.pieces):
            return None
    return result


def _common_names(
    component: Component, weights: Sequence[Weight], like_diffusers: bool
) -> tuple[list[list[Target]], Dialect | None]:
    """Names for all pieces of the weights: in the first dialect that has them, ComfyUI's before others'.

    Args:
        component: The component of the weights.
        weights: The weights.
        like_diffusers: Whether diffusers' names are preferred, because the diffusion model has them.

    Returns:
        Names for each weight, and their dialect if all have one.
    """
    dialects = sorted(
        component.dialects,
        key=lambda dialect: ("comfy" not in dialect.readers, like_diffusers and "diffusers" not in dialect.readers),
    )
    tables = [[targets_in(dialect, weight) for weight in weights] for dialect in dialects]
    for dialect, table in zip(dialects, tables, strict=True):
        if all(fits(targets, weight) for targets, weight in zip(table, weights, strict=True)):
            return table, dialect
    result: list[list[Target]] = []
    for i, weight in enumerate(weights):
        # parts that no dialect names are merged as the whole layer
        whole = [Target(weight.key, 0, weight.total)]
        result.append(next((table[i] for table in tables if fits(table[i], weight)), whole))
    return result, None


def _widen_image_input(adapters: Sequence[Adapter], resolution: Resolution) -> list[Adapter]:
    """Control LoRAs of Flux widen the model's input: other updates of it get columns of zeros."""
    names = [name for name, position in resolution.positions.items() if position.rows.key == _IMAGE_INPUT]
    widths = {adapter.modules[name].d_in for adapter in adapters for name in names if name in adapter.modules}
    controls = any(key.endswith(("_norm.scale", "img_in.reshape_weight")) for a in adapters for key in a.extras)
    if len(widths) < 2 or not controls:
        return list(adapters)
    result: list[Adapter] = []
    for adapter in adapters:
        modules = dict(adapter.modules)
        for name in names:
            if name in modules and modules[name].d_in < max(widths):
                A = F.pad(modules[name].A, (0, max(widths) - modules[name].d_in))
                modules[name] = replace(modules[name], A=A)
        result.append(replace(adapter, modules=modules))
    return result


def _unify_unknown(adapters: Sequence[Adapter], unknown: Sequence[str]) -> list[Adapter]:
    """One spelling for layers outside of the family's table whose names differ in prefix and punctuation only.

    ComfyUI reads the dotted and the underscored spelling of all its own names.
    """
    groups: dict[str, list[str]] = defaultdict(list)
    for name in unknown:
        for prefix in _NATIVE_PREFIXES:
            if name.startswith(prefix):
                groups[name.removeprefix(prefix).replace(".", "_")].append(name)
    key_map = {
        name: (MappedRows(min(names, key=lambda name: not name.startswith(_NATIVE_PREFIXES[0]))),)
        for names in groups.values()
        if len(names) > 1
        for name in names
    }
    if not key_map:
        return list(adapters)
    return [
        apply_key_map(adapter, key_map) if key_map.keys() & set(adapter.layers) else adapter for adapter in adapters
    ]
