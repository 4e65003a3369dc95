"""LoRA files: read into an Adapter, written from one. A format is a file here and a row in `FORMATS`."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import FormatError, SaveError
from ..memory import report_out_of_memory
from . import files, hashes, peft_folder
from .base import Format
from .comfy import Comfy
from .diffusers import Diffusers
from .kohya import Kohya
from .peft import Peft
from .peft_folder import Folder, folder_of, read_folder
from .suffixes import classify
from .unchanged import unchanged
from .writing import cast_adapter, folded

__all__ = [
    "FORMATS",
    "Format",
    "Summary",
    "detect",
    "fingerprint",
    "from_state_dict",
    "load",
    "save",
    "summarise",
    "to_state_dict",
    "weights_of",
]

_PEFT = Peft()
FORMATS: dict[str, Format] = {"kohya": Kohya(), "peft": _PEFT, "comfy": Comfy(), "diffusers": Diffusers()}
"""In the order of detection; the last takes whatever is left."""


def load(path: str | Path, *, convert_rank: int | None = None, known: bool = False) -> Adapter:
    """Read a LoRA: a safetensors file of any format, or a PEFT folder.

    The tensors keep their dtype and are views of the memory-mapped file.

    Args:
        path: File or folder. The weights of a PEFT folder, or a part of them, mean the folder.
        convert_rank: Turn LoHa, LoKr and full deltas into low-rank updates of this rank (exactly factorised, then the
            best approximation of that rank). ``None`` refuses them.
        known: The file was loaded before, or is checked and hashed by the caller: the time for that is saved.

    Raises:
        FormatError: Whatever keeps the file from being a sound, finite LoRA; names the file and the key.
        MergeError: Not enough memory.
    """
    path = Path(path)
    with unchanged([path]):
        return _loaded(path, convert_rank, known)


def _loaded(path: Path, convert_rank: int | None, known: bool) -> Adapter:
    folder = _folder(path)
    weights = _weights(path, folder)
    tensors, metadata = files.read_tensors(*weights)
    source = Source(str(path), "", "" if folder is None else _PEFT.name)
    if folder is not None:
        folder.demand_all(tensors)
        metadata[CONFIG_KEY] = folder.config
    with report_out_of_memory(), hashes.hash_in_background([] if known else [weights]) as hashed:
        adapter = from_state_dict(tensors, metadata, source=source, convert_rank=convert_rank)
        if known:
            return adapter
        adapter.check_finite()
        return adapter.sourced(sha256=hashed[0].result())


def weights_of(path: Path) -> tuple[Path, ...]:
    """The files that hold the numbers of a LoRA: itself, or those of a PEFT folder.

    Raises:
        FormatError: A path without a LoRA.
    """
    return _weights(path, _folder(path))


def _weights(path: Path, folder: Folder | None) -> tuple[Path, ...]:
    return (path,) if folder is None else folder.weights


def fingerprint(path: str | Path) -> str:
    """Tells LoRAs apart by their size, their beginning and their end, in a moment however large they are.

    Raises:
        FormatError: A path without a LoRA.
    """
    path = Path(path)
    folder = _folder(path)
    return hashes.fingerprint(*_weights(path, folder), text="" if folder is None else folder.config)


def _folder(path: Path) -> Folder | None:
    """The PEFT folder that is meant, ``None`` for any other file."""
    try:
        found = folder_of(path)
        return None if found is None else read_folder(found)
    except OSError as error:  # e.g. a name that is too long for the system
        raise FormatError("The path cannot be used.", file=path, found=error.strerror or str(error)) from error


def save(adapter: Adapter, path: str | Path, *, format: str | None = None, dtype: torch.dtype | None = None) -> Path:
    """Write a LoRA, atomically and with the same bytes every time.

    Args:
        adapter: Its module names must be those of the format.
        path: A file, ``.safetensors`` is added where it is missing; for ``peft`` a folder, or a file if the adapter
            came from a lone file, without a configuration.
        format: A name in `FORMATS`; default that of the adapter's source, else told from the names.
        dtype: Of factors and diffs; default their own.

    Returns:
        The path written.

    Raises:
        SaveError: Names the format cannot say, numbers the dtype cannot hold, or a path that cannot be written.
            Nothing is left behind and an old file stays whole.
    """
    path = Path(path)
    configured = _PEFT.name if CONFIG_KEY in adapter.metadata else ""
    format = format or adapter.source.format or configured or detect([*adapter.modules, *adapter.diffs])
    chosen = _format(format)
    if dtype is not None:
        adapter = cast_adapter(adapter, dtype)
    # a PEFT file that came without a configuration is written without one; its readers take the scale for 1
    lone = format == adapter.source.format == _PEFT.name and not configured and path.suffix == ".safetensors"
    if lone:
        adapter = replace(adapter, modules={name: folded(part, name) for name, part in adapter.modules.items()})
    state, metadata = chosen.write(adapter)
    if lone or format != _PEFT.name:
        if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
            raise SaveError("LoRAs are written as safetensors only.", file=path, expected="a name ending .safetensors")
        path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
        if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
            raise SaveError("The output is a folder.", file=path, expected="the name of a file")
        files.write_tensors(path, state, metadata)
        return path
    if path.suffix == ".safetensors" or path.is_file():
        raise SaveError("A PEFT adapter is a folder, not a file.", file=path, expected="the name of a folder")
    config = json.dumps(_PEFT.config(adapter), indent=2, sort_keys=True) + "\n"
    files.write_folder(
        path,
        {peft_folder.WEIGHTS: files.tensor_writer(state, metadata), peft_folder.CONFIG: files.text_writer(config)},
    )
    return path


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    source: Source | None = None,
    convert_rank: int | None = None,
) -> Adapter:
    """An adapter from tensors by key, e.g. what another program has loaded.

    Args:
        state_dict: Keys of any format.
        metadata: The file's strings. A PEFT configuration is expected as JSON under ``adapter_config``.
        source: Where it comes from; its format is detected unless it says one.
        convert_rank: See `load`.

    Raises:
        FormatError: As `load`, but numbers are not checked to be finite.
    """
    source = source or Source()
    if not source.format:
        source = replace(source, format=detect(state_dict))
    return _format(source.format).read(state_dict, dict(metadata or {}), source, convert_rank)


def to_state_dict(adapter: Adapter, format: str) -> dict[str, Tensor]:
    """The tensors a file of the format would hold.

    Raises:
        SaveError: Names the format cannot say.
    """
    return _format(format).write(adapter)[0]


def detect(keys: Mapping[str, object] | list[str]) -> str:
    """The name of the format that keys (or module names) are of."""
    return next(name for name, format in FORMATS.items() if format.matches(keys))


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise SaveError("There is no such format.", expected=", ".join(FORMATS), found=name)
    return FORMATS[name]


@dataclass(frozen=True)
class Summary:
    """What a file holds, told from its header alone: works for files that cannot be merged too.

    Args:
        path: As named by the user.
        format: The format's name.
        modules: How many modules have an update of any kind.
        roles: How many keys of each role (``down``, ``up``, ``alpha``, ``lokr_w1`` ...).
        ranks: How many modules of each rank.
        dtypes: How many tensors of each dtype.
        others: Keys that are no part of an update.
        names: The module names, sorted.
        metadata: The file's strings; a PEFT folder's configuration under ``adapter_config``.
    """

    path: str
    format: str
    modules: int
    roles: Mapping[str, int]
    ranks: Mapping[int, int]
    dtypes: Mapping[str, int]
    others: tuple[str, ...]
    names: tuple[str, ...]
    metadata: Mapping[str, str]


def summarise(path: str | Path) -> Summary:
    """Look into a LoRA file or PEFT folder without reading its tensors.

    Raises:
        FormatError: A file that is not a sound safetensors file.
    """
    path = Path(path)
    folder = _folder(path)
    header = files.read_header(*_weights(path, folder))
    roles, others = classify(header.shapes)
    ranks = Counter(
        header.shapes[keys["down"]][0] for keys in roles.values() if header.shapes.get(keys.get("down", ""))
    )
    return Summary(
        path=str(path),
        format=_PEFT.name if folder is not None else detect(list(header.shapes)),
        modules=len(roles),
        roles=dict(sorted(Counter(role for keys in roles.values() for role in keys).items())),
        ranks=dict(sorted(ranks.items())),
        dtypes=dict(sorted(Counter(header.dtypes.values()).items())),
        others=tuple(sorted(others)),
        names=tuple(sorted(roles)),
        metadata={**header.metadata, **({} if folder is None else {CONFIG_KEY: folder.config})},
    )
