"""Convert a LoRA to another file format or dtype; the recipe of a merged one records it, so that it can be repeated."""

from __future__ import annotations

from dataclasses import replace

import torch

from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import name_some
from ..formats import FORMATS, format_of, reread
from ..formats.writing import cast_adapter
from ..layers.families.table import Reader
from ..merge.edits import Edits
from .dtype_names import DTYPES
from .metadata import KEY, NOT_REPEATABLE, with_conversion, with_note
from .output import RenameForFormat, name_output
from .recipe import Conversion, DtypeName


def convert(
    adapter: Adapter,
    format: str | None = None,
    dtype: torch.dtype | None = None,
    *,
    reader: Reader | None = None,
    rename_for_format: RenameForFormat | None = None,
    only: str | None = None,
    cap: float | None = None,
) -> Adapter:
    """Return an adapter under the names of a file format and in a dtype, ready for `core.formats.save`.

    If its metadata holds the recipe of a merge, the conversion is added to the recipe. Where that cannot be repeated, a
    note in the metadata gives the reason instead.

    Args:
        adapter: The LoRA as loaded, or the result of a merge.
        format: Name in ``FORMATS``; default the adapter's own.
        dtype: Dtype of factors and diffs; default their own.
        reader: Program that shall read the file, see `name_output`; default ``comfy`` for the format ``comfy``. Names
            are kept if neither it nor another format is given.
        rename_for_format: The host's function for families without a table; ``None`` keeps their names.
        only: Patterns of the layers to keep, see `layers_matching`; default all.
        cap: Limit of singular values, see `cap_limits`; default none.

    Raises:
        SaveError: The dtype cannot hold a value, or the reader has no names for some layers.
        MergeError: A layer has no name in the format, a pattern that matches nothing, or a cap below 1.
    """
    own_format = format_of(adapter)
    target = format or own_format
    reader = "comfy" if reader is None and format == "comfy" else reader
    edits = Edits(only, cap)
    converted = _converted(adapter, target, dtype, reader, rename_for_format, edits)
    if KEY not in adapter.metadata:
        return converted
    from_folder = adapter.source.format == "peft" and CONFIG_KEY in adapter.metadata
    saved = reread(adapter, folder=from_folder)
    if converted is adapter and target == own_format and saved.metadata == adapter.metadata:
        return converted
    if not adapter.source.sha256:  # its file has other alphas and more metadata
        converted = _converted(saved, target, dtype, reader, rename_for_format, edits)
    dtype_name: DtypeName | None = next((name for name in DTYPES if getattr(torch, name) == dtype), None)
    unusual = [] if rename_for_format else [n for n in converted.layers if not FORMATS[target].is_native_name(n)]
    if unusual:
        obstacle = f"layers such as {name_some(unusual, 1)} would be renamed"
    elif dtype is not None and dtype_name is None:
        obstacle = f"recipes know no {dtype}"
    elif adapter.source.convert_rank:
        obstacle = f"updates that were not low rank were approximated at rank {adapter.source.convert_rank}"
    else:
        step = Conversion(format=target, reader=reader, dtype=dtype_name, from_folder=from_folder, only=only, cap=cap)
        return replace(converted, metadata=with_conversion(converted.metadata, step))
    return replace(converted, metadata=with_note(converted.metadata, f"{NOT_REPEATABLE}: {obstacle}"))


def repeat_conversion(adapter: Adapter, step: Conversion, rename_for_format: RenameForFormat | None) -> Adapter:
    """Return a merged adapter after a conversion of its recipe, as if it had been saved, loaded and converted.

    Raises:
        SaveError, MergeError: See `convert`.
    """
    dtype = None if step.dtype is None else getattr(torch, step.dtype)
    saved = reread(adapter, folder=step.from_folder)
    edits = Edits(step.only, step.cap)
    converted = _converted(saved, step.format, dtype, step.reader, rename_for_format, edits)
    metadata = with_conversion(converted.metadata, step)
    return replace(converted, metadata=metadata, source=Source(format=step.format))


def _converted(
    adapter: Adapter,
    format: str,
    dtype: torch.dtype | None,
    reader: Reader | None,
    rename_for_format: RenameForFormat | None,
    edits: Edits,
) -> Adapter:
    own_format = format_of(adapter)
    adapter = edits.apply(adapter)
    if reader is not None or format != own_format:
        named, _ = name_output(
            adapter, first_format=own_format, format=format, reader=reader, rename_for_format=rename_for_format
        )
        adapter = adapter if named.layers == adapter.layers else named
    return adapter if dtype is None else cast_adapter(adapter, dtype)
