"""Names of one layer that differ in prefix and punctuation only, told alike without any table.

``lora_unet_blocks_0_self_attn_q`` cannot be split: which underscores were dots is not told. But the dotted names of
the OTHER adapters can be flattened, and what looks alike then is alike.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from ..adapter import Adapter, is_text_encoder
from .keymap import Piece, rename

_DOTTED = ("diffusion_model.", "transformer.", "unet.")
_FLAT = ("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_")
# Stable Diffusion's blocks: their dotted names are read by some programs only, a host knows names for all.
_UNET = ("down_blocks", "mid_block", "up_blocks", "input_blocks", "middle_block", "output_blocks")


def respelled(adapters: Sequence[Adapter]) -> list[Adapter]:
    """The adapters with all layers of the diffusion model that look alike spelled alike.

    A layer that only an underscored adapter has is spelled after its like in another block, and keeps its name where
    there is none. Programs that read any of the dialects read all names of the result.
    """
    names = {name for adapter in adapters for name in adapter.layers if not is_text_encoder(name)}
    dotted = {name for name in names if not name.startswith(_FLAT)}
    if not dotted or any(_path(name).startswith(_UNET) for name in names):
        return list(adapters)
    prefix = _prefix(names)
    paths = {_flat(_path(name)): _path(name) for name in sorted(dotted, reverse=True)}
    likes = {_kind(flat): path for flat, path in paths.items()}
    targets: dict[str, str] = {}
    for name in names:
        flat = _flat(_path(name))
        path = paths.get(flat) or _numbered(likes.get(_kind(flat)), flat)
        if path is not None:
            targets[name] = prefix + path
    for adapter in adapters:
        own = {name: targets.get(name, name) for name in adapter.layers}
        if len(set(own.values())) < len(own):  # one file names a layer in two ways: for a host to tell apart
            return list(adapters)
    key_map = {name: (Piece(target),) for name, target in targets.items()}
    return [rename(adapter, key_map) for adapter in adapters]


def _prefix(names: set[str]) -> str:
    """What all programs expect before these paths: those of ``lora_unet_`` names are ComfyUI's own."""
    for prefix in _DOTTED:
        if any(name.startswith(prefix) for name in names):
            return prefix
    return _DOTTED[0] if any(name.startswith("lora_unet_") for name in names) else ""


def _path(name: str) -> str:
    return name.removeprefix(next((prefix for prefix in (*_DOTTED, *_FLAT) if name.startswith(prefix)), ""))


def _flat(path: str) -> str:
    return path.replace(".", "_").rstrip("_")  # some exporters leave an underscore at the end


def _kind(flat: str) -> str:
    return re.sub(r"\d+", "#", flat)


def _numbered(like: str | None, flat: str) -> str | None:
    numbers = iter(re.findall(r"\d+", flat))
    return None if like is None else re.sub(r"\d+", lambda _: next(numbers), like)
