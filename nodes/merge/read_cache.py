"""LoRAs are read again only where they changed: not for another rank, method or strength."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...core.formats.file_changes import file_states
from ..loaded_loras import LoadedLoras, read_files
from ..lora import Lora

_Key = tuple[object, ...]


class _NoModel:
    """Stands for the model where there is none."""


_NO_MODEL = _NoModel()
# The last reading for every model, which dies with it; of files mapped into memory, so that little is held.
_last: weakref.WeakKeyDictionary[Any, tuple[_Key, Sequence[Lora], LoadedLoras]] = weakref.WeakKeyDictionary()


def read(loras: Sequence[Lora], model: Any, clip: Any) -> LoadedLoras:
    """Read LoRAs, through the model if there is one (see `lora_loader.read`); strengths play no part in it.

    Raises:
        MergeError, FormatError: See `lora_loader.read` and `read_files`.
    """
    owner = _NO_MODEL if model is None else model
    key = (None if clip is None else weakref.ref(clip), *map(_state, loras))
    last = _last.get(owner)
    if last is not None and last[0] == key:
        return last[2]
    reading = read_files(loras) if model is None else _read_for(loras, model, clip)
    _last[owner] = (key, loras, reading)  # the LoRAs, so that no other object gets an id of the key
    return reading


def _read_for(loras: Sequence[Lora], model: Any, clip: Any) -> LoadedLoras:
    from ..comfy import lora_loader  # here: without a model nothing of ComfyUI is needed

    return lora_loader.read(loras, model, clip)


def _state(lora: Lora) -> _Key:
    """Tells a LoRA from others, and a file from what it was before."""
    content = file_states([lora.content]) if isinstance(lora.content, Path) else id(lora.content)
    return (lora.label, lora.convert_rank, content)
