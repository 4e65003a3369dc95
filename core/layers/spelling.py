"""Match names of one layer that differ in prefix and punctuation only, without any table.

``lora_unet_blocks_0_self_attn_q`` cannot be split, because nothing tells which underscores were dots. But the dotted
names of the OTHER adapters can be flattened, and names that are equal then mean one layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..adapter import Adapter, is_text_encoder
from .keymap import MappedRows, apply_key_map

_DOTTED_PREFIXES = ("diffusion_model.", "transformer.", "unet.")
_FLAT_PREFIXES = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
# Blocks of Stable Diffusion's U-Nets: few programs read their dotted names; a host has names that all programs read.
_UNET_BLOCKS = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")


def unify_spelling(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with one spelling for all layers of the diffusion model whose flattened names are equal.

    A layer that occurs in underscored adapters only is spelled like the same layer of another block, and keeps its
    name where there is none. Programs that read any of the dialects read all names of the result.
    """
    names = {name for adapter in adapters for name in adapter.layers if not is_text_encoder(name)}
    dotted = {name for name in names if not name.startswith(_FLAT_PREFIXES)}
    if not dotted or any(_path(name).startswith(_UNET_BLOCKS) for name in names):
        return list(adapters)
    prefix = _common_prefix(names)
    paths = {_flatten(_path(name)): _path(name) for name in sorted(dotted, reverse=True)}
    examples = {_without_numbers(flat): path for flat, path in paths.items()}
    targets: dict[str, str] = {}
    for name in names:
        flat = _flatten(_path(name))
        path = paths.get(flat) or _with_numbers_of(flat, examples.get(_without_numbers(flat)))
        if path is not None:
            targets[name] = prefix + path
    for adapter in adapters:
        renamed = {targets.get(name, name) for name in adapter.layers}
        if len(renamed) < len(adapter.layers):  # two names of one layer in one file: only a host can tell
            return list(adapters)
    key_map = {name: (MappedRows(target),) for name, target in targets.items()}
    return [apply_key_map(adapter, key_map) for adapter in adapters]


def _common_prefix(names: set[str]) -> str:
    """The prefix that programs expect before these paths; paths of ``lora_unet_`` names are ComfyUI's own."""
    for prefix in _DOTTED_PREFIXES:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return _DOTTED_PREFIXES[0] if any(name.startswith("lora_unet_") for name in names) else ""


def _path(name: str) -> str:
    prefixes = (*_DOTTED_PREFIXES, *_FLAT_PREFIXES)
    return name.removeprefix(next((prefix for prefix in prefixes if name.startswith(prefix)), ""))


def _flatten(path: str) -> str:
    return path.replace(".", "_").rstrip("_")  # some exporters leave an underscore at the end


def _without_numbers(flat: str) -> str:
    return re.sub(r"\d+", "#", flat)


def _with_numbers_of(flat: str, example: str | None) -> str | None:
    """The path of the same layer in another block, with this block's numbers."""
    numbers = iter(re.findall(r"\d+", flat))
    return None if example is None else re.sub(r"\d+", lambda _: next(numbers), example)
