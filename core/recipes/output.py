"""The file format of a merge whose recipe leaves it open."""

from __future__ import annotations

from ..adapter import Adapter
from ..formats import FORMATS, detect

_BARE_UNET_PREFIXES = ("down_blocks.", "mid_block.", "up_blocks.")
_DIFFUSERS_PREFIXES = ("unet.", "text_encoder.", "text_encoder_2.", *_BARE_UNET_PREFIXES)


def should_have_kohya_names(first_format: str, merged: Adapter) -> bool:
    """Return whether a Stable Diffusion LoRA under diffusers' names is better saved under kohya's.

    kohya's names are read by every tool, diffusers' names by diffusers, and bare U-Net names by none.

    Args:
        first_format: Format of the first input.
        merged: The merged adapter.
    """
    translatable = all(name.startswith(_DIFFUSERS_PREFIXES) for name in merged.modules)
    prefixes = ("unet.", *_BARE_UNET_PREFIXES) if first_format == "kohya" else _BARE_UNET_PREFIXES
    return translatable and any(name.startswith(prefixes) for name in merged.modules)


def default_format(first_format: str, merged: Adapter, renamed: bool) -> str:
    """Return the first input's format if it can express the merged names, else one that can.

    ``comfy`` can express any name, also the names of several dialects in one file, because its readers look up each
    key by itself.

    Args:
        first_format: Format of the first input, ``""`` where it never was a file.
        merged: The merged adapter.
        renamed: Whether a host has renamed modules: the names are then the host's own, even if the first format could
            express them too.
    """
    names = merged.layers
    if not renamed and first_format in FORMATS and all(FORMATS[first_format].can_store_name(name) for name in names):
        return first_format
    detected = detect(names)
    return detected if all(FORMATS[detected].is_native_name(name) for name in names) else "comfy"
