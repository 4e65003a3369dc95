"""LoRAs as the engine merges them, and how to load them without a model: by the file formats the engine knows."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path

from ..core import formats
from ..core.adapter import Adapter, Source
from ..core.formats.file_changes import file_states
from ..core.layers.align import KeyMapResolver, align
from ..core.layers.keymap import KeyMap, ParameterSlice
from ..core.merge.cache import GramCache
from .file_hashes import FileState, sha256_later
from .graph_lora import GraphLora


@dataclass(frozen=True, eq=False)
class LoadedLoras:
    """LoRAs under common module names.

    Args:
        adapters: One per LoRA, under the common names.
        originals: The same under the names of their own files.
        renamed: Whether aligning them without a model renamed layers.
        connected: The connected model in words, e.g. ``Flux with CLIP``; empty without one.
        file_notes: Sentences on files that were found under other names.
        dropped: Keys of the files that the model has no layer for, with the reason, for the report.
        finish: Turns the merged adapter into one whose names the stock loader reads.
        slices: Module name -> its rows of a parameter of the connected model; empty without one.
        cache: Gram matrices of these adapters, for the next merge.
        pending: Position of a LoRA -> the hash of its file, which its adapters have not got yet, see `hashed`.
    """

    adapters: list[Adapter]
    originals: list[Adapter]
    renamed: bool = False
    connected: str = ""
    file_notes: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    finish: Callable[[Adapter], Adapter] = lambda adapter: adapter
    slices: Mapping[str, ParameterSlice] = field(default_factory=dict)
    cache: GramCache = field(default_factory=GramCache)
    pending: Mapping[int, Future[str]] = field(default_factory=dict[int, "Future[str]"])

    def hashed(self) -> LoadedLoras:
        """The same with the hashes of all files in the adapters' sources; waits until they are computed.

        Raises:
            FormatError: A file changed after it was loaded.
        """
        if not self.pending:
            return self
        adapters, originals = list(self.adapters), list(self.originals)
        for i, pending in self.pending.items():
            adapters[i], originals[i] = (x[i].sourced(sha256=pending.result()) for x in (adapters, originals))
        return replace(self, adapters=adapters, originals=originals, pending={})

    @property
    def notes(self) -> tuple[str, ...]:
        """The notes of all LoRAs, for a report."""
        return (*self.file_notes, *(note for adapter in self.originals for note in adapter.notes))


def adapter_of(lora: GraphLora) -> Adapter:
    """A LoRA as an adapter, under the names of its own file.

    Raises:
        FormatError: A file that cannot be read.
    """
    return _adapter_of(lora, verify=True)


def _adapter_of(lora: GraphLora, *, verify: bool) -> Adapter:
    """Load a LoRA; `verify` applies to files, see `formats.load`."""
    if isinstance(lora.content, Adapter):
        return lora.content
    rank = lora.convert_rank or None
    if isinstance(lora.content, Path):
        return formats.load(lora.content, convert_rank=rank, verify=verify)
    return formats.from_state_dict(lora.content, {}, source=Source(lora.label), convert_rank=rank)


def read_files(loras: Sequence[GraphLora]) -> LoadedLoras:
    """Load LoRAs without a model and bring them to common names, by diffusers' key maps where it is installed.

    Values are not checked to be finite: merges do that with what they compute.

    Raises:
        MergeError: LoRAs whose names cannot be matched without the model.
        FormatError: A file that cannot be read.
    """
    states = states_of(loras)
    originals = [_adapter_of(lora, verify=False) for lora in loras]
    adapters = align(originals, key_map=file_key_map())
    renamed = any(before is not after for before, after in zip(originals, adapters, strict=True))
    return LoadedLoras(adapters, originals, renamed, file_notes=file_notes(loras), pending=hashes_later(loras, states))


def states_of(loras: Sequence[GraphLora]) -> list[FileState]:
    """The states of the LoRAs' files, before they are loaded; empty for a LoRA of the graph."""
    return [file_states([lora.content]) if isinstance(lora.content, Path) else {} for lora in loras]


def hashes_later(loras: Sequence[GraphLora], states: Sequence[FileState]) -> dict[int, Future[str]]:
    """The hashes of the files of LoRAs that have been loaded, see `LoadedLoras.pending`."""
    return {
        i: sha256_later(lora.content, state)
        for i, (lora, state) in enumerate(zip(loras, states, strict=True))
        if isinstance(lora.content, Path)
    }


def file_notes(loras: Sequence[GraphLora]) -> tuple[str, ...]:
    """The notes on the files of LoRAs; they are shown, but not stored in a merged file, which names the files used."""
    return tuple(dict.fromkeys(lora.note for lora in loras if lora.note))


def file_key_map() -> KeyMapResolver | None:
    """diffusers' key map for `align`, or ``None`` where diffusers is not installed.

    diffusers takes seconds to import, so that is done when LoRAs need the map.
    """
    return None if find_spec("diffusers") is None else _diffusers_key_map


def _diffusers_key_map(adapters: Sequence[Adapter]) -> KeyMap:
    try:
        layer_names = importlib.import_module("...hosts.diffusers.layer_names", __name__)
    except (ImportError, RuntimeError):  # RuntimeError: this diffusers does not work with the installed torch
        return {}
    return layer_names.key_map(adapters)
