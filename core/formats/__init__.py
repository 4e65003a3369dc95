"""Read LoRA files into an `Adapter` and write them from one. Each format is a module here and a row in `FORMATS`."""

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
from .base_weights import BaseWeights
from .bfl_control import comfy_tensors, is_bfl_control
from .comfy import Comfy
from .diffusers import Diffusers
from .file_changes import raise_if_changed
from .kohya import Kohya
from .peft import Peft
from .peft_folder import PeftFolder, find_peft_folder, read_peft_folder
from .suffixes import classify
from .writing import cast_adapter, fold_scale

__all__ = [
    "BaseWeights",
    "FORMATS",
    "Format",
    "Summary",
    "detect",
    "fingerprint",
    "format_of",
    "from_state_dict",
    "load",
    "reread",
    "save",
    "summarise",
    "to_state_dict",
    "weight_files",
]

_PEFT = Peft()
FORMATS: dict[str, Format] = {"kohya": Kohya(), "peft": _PEFT, "comfy": Comfy(), "diffusers": Diffusers()}
"""In the order of detection; the last one matches everything."""


def load(
    path: str | Path,
    *,
    convert_rank: int | None = None,
    base: str | Path | BaseWeights | None = None,
    verify: bool = True,
) -> Adapter:
    """Read a LoRA: a safetensors file of any format, or a PEFT folder.

    The tensors keep their dtype and are views of the memory-mapped file.

    Args:
        path: File or folder. The weight file of a PEFT folder, or one of its shards, stands for the folder.
        convert_rank: Convert LoHa, LoKr and full differences of matrices to low-rank updates of this rank (exactly
            factorised, then the best approximation of that rank). ``None`` refuses LoHa and LoKr, and reads full
            differences as diffs.
        base: The base model, a checkpoint or a folder, with which a DoRA becomes low-rank updates of `convert_rank`.
            ``None`` refuses DoRA.
        verify: Check that all values are finite, and hash the file. ``False`` saves that time where the file was
            loaded before, or the caller does both.

    Raises:
        FormatError: The file is not a valid LoRA with finite values; the error names the file and the key.
        MergeError: Not enough memory.
    """
    path = Path(path)
    with raise_if_changed([path]):
        weights = BaseWeights(Path(base)) if isinstance(base, (str, Path)) else base
        return _load(path, convert_rank, weights, verify)


def _load(path: Path, convert_rank: int | None, base: BaseWeights | None, verify: bool) -> Adapter:
    folder = _peft_folder(path)
    weights = _weight_files(path, folder)
    tensors, metadata = files.read_tensors(*weights)
    source = Source(str(path), "", "" if folder is None else _PEFT.name)
    if folder is not None:
        folder.check_complete(tensors)
        metadata[CONFIG_KEY] = folder.config
    with report_out_of_memory(), hashes.hash_in_background([weights] if verify else []) as hashed:
        adapter = from_state_dict(tensors, metadata, source=source, convert_rank=convert_rank, base=base)
        if not verify:
            return adapter
        adapter.check_finite()
        return adapter.sourced(sha256=hashed[0].result())


def weight_files(path: Path) -> tuple[Path, ...]:
    """The files with the tensors of a LoRA: the file itself, or those of a PEFT folder.

    Raises:
        FormatError: There is no LoRA under this path.
    """
    return _weight_files(path, _peft_folder(path))


def _weight_files(path: Path, folder: PeftFolder | None) -> tuple[Path, ...]:
    return (path,) if folder is None else folder.weights


def fingerprint(path: str | Path) -> str:
    """Hash of the size, the beginning and the end of a LoRA's files: quick for files of any size.

    Raises:
        FormatError: There is no LoRA under this path.
    """
    path = Path(path)
    folder = _peft_folder(path)
    return hashes.fingerprint(*_weight_files(path, folder), text="" if folder is None else folder.config)


def _peft_folder(path: Path) -> PeftFolder | None:
    """The PEFT folder that a path stands for, ``None`` for any other file."""
    try:
        folder = find_peft_folder(path)
        return None if folder is None else read_peft_folder(folder)
    except OSError as error:  # e.g. a name that is too long for the file system
        raise FormatError("The path cannot be used.", file=path, found=error.strerror or str(error)) from error


def save(adapter: Adapter, path: str | Path, *, format: str | None = None, dtype: torch.dtype | None = None) -> Path:
    """Write a LoRA, atomically and with the same bytes every time.

    Args:
        adapter: The LoRA; its module names must be those of the format.
        path: A file, ``.safetensors`` is appended where it is missing; for ``peft`` a folder, or a file if the adapter
            came from a single file without a configuration.
        format: A key in `FORMATS`; default the format of the adapter's source, else detected from the names.
        dtype: Dtype of factors and diffs; default their own.

    Returns:
        The path written.

    Raises:
        SaveError: The format cannot store a name, the dtype cannot hold a value, or the path cannot be written.
            Nothing is left behind and an existing file stays as it was.
    """
    path = Path(path)
    format = format or format_of(adapter)
    if dtype is not None:
        adapter = cast_adapter(adapter, dtype)
    # a PEFT file that came without a configuration is written without one
    single_file = format != _PEFT.name or (
        adapter.source.format == _PEFT.name and CONFIG_KEY not in adapter.metadata and path.suffix == ".safetensors"
    )
    state, metadata, config = _contents(adapter, format, single_file)
    if single_file:
        if path.suffix.lower() in (".pt", ".pth", ".bin", ".ckpt"):
            raise SaveError("LoRAs are written as safetensors only.", file=path, expected="a name ending .safetensors")
        path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
        if os.path.isdir(path):  # noqa: PTH112 (Path.is_dir raises for a name that is too long)
            raise SaveError("The output is a folder.", file=path, expected="the name of a file")
        files.write_tensors(path, state, metadata)
        return path
    if path.suffix == ".safetensors" or path.is_file():
        raise SaveError("A PEFT adapter is a folder, not a file.", file=path, expected="the name of a folder")
    files.write_folder(
        path,
        {peft_folder.WEIGHTS: files.tensor_writer(state, metadata), peft_folder.CONFIG: files.text_writer(config)},
    )
    return path


def reread(adapter: Adapter, *, folder: bool = False) -> Adapter:
    """The adapter as `load` returns it after `save` in its own format; writes no file.

    Args:
        adapter: The LoRA.
        folder: For ``peft``: as saved to a folder instead of a single file.

    Raises:
        SaveError: The format cannot store a name.
    """
    format = format_of(adapter)
    single_file = format != _PEFT.name or not folder
    state, metadata, config = _contents(adapter, format, single_file)
    metadata = metadata if single_file else {**metadata, CONFIG_KEY: config}
    # a single file is read in the format that its keys show
    return from_state_dict(state, metadata, source=replace(adapter.source, format="" if single_file else format))


def format_of(adapter: Adapter) -> str:
    """The format in which an adapter is saved unless another is requested: its source's, else that of its names."""
    configured = _PEFT.name if CONFIG_KEY in adapter.metadata else ""
    return adapter.source.format or configured or detect([*adapter.modules, *adapter.diffs])


def _contents(adapter: Adapter, format: str, single_file: bool) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors and metadata of the weight file, and the text of the configuration, ``""`` for a single file."""
    chosen = _format(format)
    if single_file and format == _PEFT.name:  # its readers assume scale 1
        adapter = replace(adapter, modules={name: fold_scale(part, name) for name, part in adapter.modules.items()})
    state, metadata = chosen.write(adapter)
    config = "" if single_file else json.dumps(_PEFT.config(adapter), indent=2, sort_keys=True) + "\n"
    return state, metadata, config


def from_state_dict(
    state_dict: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    source: Source | None = None,
    convert_rank: int | None = None,
    base: BaseWeights | None = None,
) -> Adapter:
    """Make an adapter from tensors by key, e.g. from what another program has loaded.

    Args:
        state_dict: Tensors under the keys of any format.
        metadata: The file's string metadata. A PEFT configuration is expected as JSON under ``adapter_config``.
        source: Where the tensors come from; the format is detected unless the source names one.
        convert_rank, base: See `load`.

    Raises:
        FormatError: As `load`, but values are not checked to be finite.
    """
    source = source or Source()
    if not source.format and is_bfl_control(state_dict):
        state_dict, source = comfy_tensors(state_dict), replace(source, format="comfy")
    if not source.format:
        source = replace(source, format=detect(state_dict))
    return _format(source.format).read(state_dict, dict(metadata or {}), source, convert_rank, base)


def to_state_dict(adapter: Adapter, format: str) -> dict[str, Tensor]:
    """The tensors that a file of the format would hold.

    Raises:
        SaveError: The format cannot store a name.
    """
    return _format(format).write(adapter)[0]


def detect(keys: Mapping[str, object] | list[str]) -> str:
    """The name of the format to which keys (or module names) belong."""
    return next(name for name, format in FORMATS.items() if format.matches(keys))


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise SaveError("There is no such format.", expected=", ".join(FORMATS), found=name)
    return FORMATS[name]


@dataclass(frozen=True)
class Summary:
    """The contents of a file according to its header alone; also for files that cannot be merged.

    Args:
        path: The path as the user gave it.
        format: The format's name.
        modules: Number of modules with an update of any kind.
        roles: Number of keys of each role (``down``, ``up``, ``alpha``, ``lokr_w1`` ...).
        ranks: Number of modules of each rank.
        dtypes: Number of tensors of each dtype.
        others: Keys that are not part of an update.
        names: The module names, sorted.
        metadata: The file's string metadata; a PEFT folder's configuration under ``adapter_config``.
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
    """Summarise a LoRA file or PEFT folder without reading its tensors.

    Raises:
        FormatError: The file is not a valid safetensors file.
    """
    path = Path(path)
    folder = _peft_folder(path)
    header = files.read_header(*_weight_files(path, folder))
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
