"""Convert a LoRA to another file format or dtype; the recipe of a merged one records it, so that it can be repeated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import name_some
from ..formats import FORMATS, format_of, reread
from ..formats.writing import cast_adapter
from .dtype_names import DTYPES
from .metadata import KEY, NOT_REPEATABLE, with_conversion, with_note
from .recipe import Conversion

RenameForFormat = Callable[[Adapter, str], Adapter]
"""A host's function: returns the adapter under names that a file format can express."""


def convert(
    adapter: Adapter,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    rename_for_format: RenameForFormat | None = None,
) -> Adapter:
    """Return an adapter under the names of a file format and in a dtype, ready for `core.formats.save`.

    If its metadata holds the recipe of a merge, the conversion is added to the recipe. Where that cannot be repeated, a
    note in the metadata gives the reason instead.

    Args:
        adapter: The LoRA as loaded, or the result of a merge.
        format: Name in ``FORMATS``; default the adapter's own.
        dtype: Dtype of factors and diffs; default their own.
        rename_for_format: The host's function; ``None`` keeps all names.

    Raises:
        SaveError: The dtype cannot hold a value.
        MergeError: A layer has no name in the format.
    """
    own_format = format_of(adapter)
    format = format or own_format
    converted = _converted(adapter, format, dtype, rename_for_format)
    if KEY not in adapter.metadata:
        return converted
    from_folder = adapter.source.format == "peft" and CONFIG_KEY in adapter.metadata
    saved = reread(adapter, folder=from_folder)
    if converted is adapter and format == own_format and saved.metadata == adapter.metadata:
        return converted
    if not adapter.source.sha256:  # its file has other alphas and more metadata
        converted = _converted(saved, format, dtype, rename_for_format)
    dtype_name = next((name for name in DTYPES if getattr(torch, name) == dtype), None)
    unusual = [] if rename_for_format else [n for n in adapter.layers if not FORMATS[format].is_native_name(n)]
    if unusual:
        obstacle = f"layers such as {name_some(unusual, 1)} would be renamed"
    elif dtype is not None and dtype_name is None:
        obstacle = f"recipes know no {dtype}"
    elif adapter.source.convert_rank:
        obstacle = f"updates that were not low rank were approximated at rank {adapter.source.convert_rank}"
    else:
        step = Conversion.model_validate({"format": format, "dtype": dtype_name, "from_folder": from_folder})
        return replace(converted, metadata=with_conversion(converted.metadata, step))
    return replace(converted, metadata=with_note(converted.metadata, f"{NOT_REPEATABLE}: {obstacle}"))


def repeat_conversion(adapter: Adapter, step: Conversion, rename_for_format: RenameForFormat | None) -> Adapter:
    """Return a merged adapter after a conversion of its recipe, as if it had been saved, loaded and converted.

    Raises:
        SaveError, MergeError: See `convert`.
    """
    dtype = None if step.dtype is None else getattr(torch, step.dtype)
    converted = _converted(reread(adapter, folder=step.from_folder), step.format, dtype, rename_for_format)
    metadata = with_conversion(converted.metadata, step)
    return replace(converted, metadata=metadata, source=Source(format=step.format))


def _converted(
    adapter: Adapter, format: str, dtype: torch.dtype | None, rename_for_format: RenameForFormat | None
) -> Adapter:
    if rename_for_format is not None:
        adapter = rename_for_format(adapter, format)
    return adapter if dtype is None else cast_adapter(adapter, dtype)
