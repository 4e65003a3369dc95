"""LoRAs are read again only where they changed: not for another rank, method or strength."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .lora import Lora
from .reading import Reading, read_files

_Key = tuple[object, ...]

# The last reading for every model, which dies with it; of files mapped into memory, so that little is held.
_by_model: weakref.WeakKeyDictionary[Any, tuple[_Key, Sequence[Lora], Reading]] = weakref.WeakKeyDictionary()
_without_model: list[tuple[_Key, Sequence[Lora], Reading]] = []


def read(loras: Sequence[Lora], model: Any, clip: Any) -> Reading:
    """Read LoRAs, through the model if there is one (see `comfy.read`); strengths play no part in it.

    Raises:
        MergeError, FormatError: See `comfy.read` and `read_files`.
    """
    key = (None if clip is None else weakref.ref(clip), *map(_state, loras))
    last = (_without_model[0] if _without_model else None) if model is None else _by_model.get(model)
    if last is not None and last[0] == key:
        return last[2]
    if model is None:
        reading = read_files(loras)
        _without_model[:] = [(key, loras, reading)]
    else:
        from .comfy import read as read_for  # here: without a model nothing of ComfyUI is needed

        reading = read_for(loras, model, clip)
        _by_model[model] = (key, loras, reading)  # the LoRAs, so that no other object gets an id of the key
    return reading


def _state(lora: Lora) -> _Key:
    """Tells a LoRA from others, and a file from what it was before."""
    told: _Key = (lora.label, lora.convert_rank)
    if not isinstance(lora.content, Path):
        return (*told, id(lora.content))
    try:
        status = lora.content.stat()
    except OSError:
        return (*told, object())  # equal to nothing: whoever reads it will say what is wrong
    return (*told, lora.content, status.st_size, status.st_mtime_ns, status.st_ino)
