"""A cache of loaded LoRAs: another rank, method or strength does not load them again."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.formats.file_changes import file_states
from ..graph_lora import GraphLora
from ..loaded_loras import LoadedLoras, read_files

_Key = tuple[object, ...]

EXPIRES_AFTER = 600.0  # seconds without use; the Gram matrices kept with the LoRAs may take 512 MB


class _NoModel:
    """Key of the LoRAs that were loaded without a model."""


@dataclass(frozen=True, eq=False)
class _Entry:
    """Loaded LoRAs. `loras` keeps the objects alive whose id is in `key`."""

    key: _Key
    loras: Sequence[GraphLora]
    loaded: LoadedLoras
    expiry: threading.Timer


_NO_MODEL = _NoModel()
_entries: weakref.WeakKeyDictionary[Any, _Entry] = weakref.WeakKeyDictionary()  # model -> the LoRAs loaded last for it
_lock = threading.Lock()


def read(loras: Sequence[GraphLora], model: Any, clip: Any) -> LoadedLoras:
    """Load LoRAs, through the model if there is one (see `lora_loader.read`). Their strengths are ignored.

    Files with NaN or infinity are refused here or by the merge; without a model a report gets them.

    Per model the LoRAs loaded last are kept, until the model is gone, other LoRAs are loaded for it, or they have not
    been used for `EXPIRES_AFTER` seconds.

    Raises:
        MergeError, FormatError: See `lora_loader.read` and `read_files`.
    """
    owner = _NO_MODEL if model is None else model
    key = (None if clip is None else weakref.ref(clip), *map(_state, loras))
    with _lock:
        entry = _entries.get(owner)
    if entry is not None and entry.key == key:
        loras, loaded = entry.loras, entry.loaded
    else:
        loaded = read_files(loras) if model is None else _read_for(loras, model, clip)
    _keep(owner, key, loras, loaded)
    return loaded


def _read_for(loras: Sequence[GraphLora], model: Any, clip: Any) -> LoadedLoras:
    from ..comfy import lora_loader  # here, because loading without a model needs nothing of ComfyUI

    return lora_loader.read(loras, model, clip)


def _keep(owner: Any, key: _Key, loras: Sequence[GraphLora], loaded: LoadedLoras) -> None:
    expiry = threading.Timer(EXPIRES_AFTER, _drop, [weakref.ref(owner), weakref.ref(loaded)])
    expiry.daemon = True
    with _lock:
        previous = _entries.get(owner)
        if previous is not None:
            previous.expiry.cancel()
        _entries[owner] = _Entry(key, loras, loaded, expiry)
    expiry.start()


def _drop(owner: weakref.ref[Any], loaded: weakref.ref[LoadedLoras]) -> None:
    model = owner()
    with _lock:
        entry = None if model is None else _entries.get(model)
        if entry is not None and entry.loaded is loaded():
            del _entries[model]


def _state(lora: GraphLora) -> _Key:
    """What must be equal for a loaded LoRA to be used again: for a file also its size and time."""
    content = file_states([lora.content]) if isinstance(lora.content, Path) else id(lora.content)
    return (lora.label, lora.convert_rank, lora.note, content)
