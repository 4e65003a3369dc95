"""Names and file format of an adapter that is written: by the program that shall read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..adapter import Adapter
from ..errors import SaveError, name_some
from ..formats import FORMATS, detect
from ..layers.families.table import READERS, Reader
from ..layers.readers import rename_for
from ..layers.resolve import resolve

RenameForFormat = Callable[[Adapter, str], Adapter]
"""A host's function: returns the adapter under names that a file format can express."""

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


def name_output(
    adapter: Adapter,
    *,
    first_format: str,
    inputs: Sequence[Adapter] = (),
    renamed: bool = False,
    format: str | None = None,
    reader: Reader | None = None,
    rename_for_format: RenameForFormat | None = None,
) -> tuple[Adapter, str]:
    """Return an adapter under the names that its reader knows, and the format to save it in.

    Args:
        adapter: The adapter.
        first_format: Format of the first input, ``""`` where it never was a file.
        inputs: The adapters that it was merged from, whose names may tell more about the family; default itself.
        renamed: Whether the inputs disagreed about names, so that aligning them has renamed layers.
        format: Format to save it in; ``None`` chooses one that the reader reads.
        reader: Program that shall read it; default the format's own if a format is given, ComfyUI if the inputs
            disagreed, else that of the inputs, whose names are kept.
        rename_for_format: A host's function for layers of families without a table.

    Raises:
        SaveError: The reader has no names for some layers.
        MergeError: See the host's function.
    """
    if reader is None and format is not None and _has_names_of(format, adapter):
        return adapter, format
    wanted: Reader | None = reader or next((reader for reader in READERS if reader == format), None)
    resolution = resolve(inputs or [adapter])
    among = () if resolution is None else resolution.families
    named: Adapter | None = None
    if wanted is not None:
        accepts = (lambda name: True) if format is None else FORMATS[format].is_native_name
        named = rename_for(adapter, wanted, among=among, accepts=accepts)
    elif renamed or should_have_kohya_names(first_format, adapter):
        named = rename_for(adapter, "comfy", among=among, strict=False)
    if named is None:
        named, format = _name_unknown(adapter, first_format, renamed, format, wanted, rename_for_format)
    if format is not None:
        return named, format
    return named, _format(named, first_format, renamed or named.layers != adapter.layers, wanted)


def _has_names_of(format: str, adapter: Adapter) -> bool:
    """Return whether all names are the format's own already. ComfyUI's format stores any name."""
    return format != "comfy" and all(FORMATS[format].is_native_name(name) for name in adapter.layers)


def _format(adapter: Adapter, first_format: str, renamed: bool, reader: Reader | None) -> str:
    """Return a format that stores the adapter's names and diffs, and that the reader reads."""
    if reader is not None and reader != "comfy":
        return reader
    format = default_format(first_format, adapter, renamed)
    # ComfyUI reads no PEFT folders, and biases under the keys of its own and kohya's format only
    for_comfyui = renamed or reader == "comfy"
    needs_diffs = bool(adapter.diffs) and format in ("diffusers", "peft")
    is_folder = reader == "comfy" and format == "peft"
    return "comfy" if for_comfyui and (needs_diffs or is_folder) else format


def _name_unknown(
    adapter: Adapter,
    first_format: str,
    renamed: bool,
    format: str | None,
    reader: Reader | None,
    rename_for_format: RenameForFormat | None,
) -> tuple[Adapter, str | None]:
    """Return names and format of an adapter whose family has no table."""
    if reader == "comfy" and format is None:
        foreign = [name for name in adapter.layers if not name.startswith(("lora_unet_", "diffusion_model."))]
        if foreign:
            raise SaveError(
                "It is not known how ComfyUI names the layers of this LoRA.",
                file=adapter.source.path or None,
                module=name_some(foreign, 3),
                expected="a family of models in docs/files.md, or names such as diffusion_model.blocks.0",
                remedy="leave the program open, so that the names of the inputs are kept",
            )
    if rename_for_format is None:
        return adapter, format
    if format is None and reader is None and should_have_kohya_names(first_format, adapter):
        return adapter, "kohya"
    target = format or reader
    return (adapter if target is None else rename_for_format(adapter, target)), format
