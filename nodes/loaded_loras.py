"""Read LoRAs without a model: by the file formats the engine knows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..core import formats
from ..core.adapter import Adapter, Source
from ..core.layers.align import align
from ..core.layers.keymap import ParameterSlice
from ..core.merge.cache import GramCache
from .lora import Lora


@dataclass(frozen=True, eq=False)
class LoadedLoras:
    """LoRAs as the engine merges them: under common module names.

    Args:
        adapters: One per LoRA.
        dropped: Keys of the files that have no place in the model, with the reason, for the report.
        notes: Other things worth saying in the report.
        finish: Makes of the merged adapter one that the stock loader reads whole.
        places: Where the layers sit in the connected model, by name; empty without one.
        products: What merges of them can use again.
    """

    adapters: list[Adapter]
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    finish: Callable[[Adapter], Adapter] = lambda adapter: adapter
    places: Mapping[str, ParameterSlice] = field(default_factory=dict)
    cache: GramCache = field(default_factory=GramCache)


def adapter_of(lora: Lora) -> Adapter:
    """A LoRA as an adapter, under its own file's names."""
    if isinstance(lora.content, Adapter):
        return lora.content
    rank = lora.convert_rank or None
    if isinstance(lora.content, Path):
        return formats.load(lora.content, convert_rank=rank)
    return formats.from_state_dict(lora.content, {}, source=Source(lora.label), convert_rank=rank)


def read_files(loras: Sequence[Lora]) -> LoadedLoras:
    """Read LoRAs and bring them to common names, with diffusers' key maps where it is installed.

    Raises:
        MergeError: Files whose names cannot be told to mean the same layers without the model.
    """
    try:
        key_map = importlib.import_module("...hosts.diffusers.layer_names", __name__).key_map
    except (ImportError, RuntimeError):  # RuntimeError: a diffusers that does not fit the installed torch
        key_map = None
    return LoadedLoras(align([adapter_of(lora) for lora in loras], key_map=key_map))
