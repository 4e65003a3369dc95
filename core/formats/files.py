"""Safetensors files: checked before parsing, read lazily; written as a stream, atomically, always to the same bytes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import FormatError, SaveError, name_some
from .temporary import exclusive_lock, remove, swap_folders, temporary_name

Writer = Callable[[BinaryIO, Path], None]  # (open file, its final path for error messages)

# A parsed header takes about ten times its bytes; that of a LoRA is below 1 MB, training tags add a few.
_MAX_HEADER = 32 << 20
_PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Header:
    """Shapes and dtypes of a file's tensors, and its metadata."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    metadata: Mapping[str, str]


def read_header(*paths: Path) -> Header:
    """Read names, shapes and dtypes of the tensors, and the metadata; no tensor.

    Args:
        paths: A file, or all of its shards.

    Raises:
        FormatError: See `read_tensors`.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    dtypes: dict[str, str] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        with _open_safetensors(path) as file:
            slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
            _check_no_duplicates(slices, shapes, path)
            shapes |= {key: tuple(part.get_shape()) for key, part in slices.items()}
            dtypes |= {key: part.get_dtype() for key, part in slices.items()}
            metadata |= file.metadata() or {}
    return Header(shapes, dtypes, metadata)


def read_tensors(*paths: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, memory-mapped (the system reads the pages that are used), and the metadata.

    Args:
        paths: A file, or all of its shards.

    Raises:
        FormatError: A file does not exist, is empty, is truncated, is a pickle, or is not a safetensors file; or two
            shards hold the same tensor.
    """
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for path in paths:
        with _open_safetensors(path) as file:
            keys = sorted(file.keys())
            _check_no_duplicates(keys, tensors, path)
            with torch.inference_mode(False):  # so that caches notice what is written to them, see `digest.content_key`
                tensors |= {key: file.get_tensor(key) for key in keys}
            metadata |= file.metadata() or {}
    return tensors, metadata


def _check_no_duplicates(keys: Iterable[str], earlier: Mapping[str, object], path: Path) -> None:
    duplicates = [key for key in keys if key in earlier]
    if duplicates:
        raise FormatError("Two shards of the weights hold the same tensors.", file=path, found=name_some(duplicates, 3))


@contextmanager
def _open_safetensors(path: Path) -> Generator[safe_open]:
    check_file(path)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except SafetensorError as error:
        truncated = "incomplete" in str(error).lower() or "InvalidOffset" in str(error)
        raise FormatError(
            "The file is cut off or its header is wrong." if truncated else "The file is not a valid safetensors file.",
            file=path,
            found=str(error),
            remedy="download or export it again",
        ) from error
    except (OSError, AttributeError, KeyError, ValueError) as error:  # e.g. a dtype that this torch lacks
        raise FormatError("The file cannot be read.", file=path, found=f"{type(error).__name__}: {error}") from error


def check_file(path: Path) -> None:
    """Raise unless the size and the first bytes of a file are those of a safetensors file.

    Raises:
        FormatError: Each check has its own error.
    """
    if not path.exists():
        raise FormatError("There is no such file.", file=path, remedy="check the path")
    if not path.is_file():
        raise FormatError(
            "This is a folder, not a LoRA file.",
            file=path,
            expected="a .safetensors file, or a folder with adapter_config.json and adapter_model.safetensors",
        )
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(16)
    except OSError as error:
        raise FormatError("The file cannot be read.", file=path, found=error.strerror or str(error)) from error
    if size == 0:
        raise FormatError("The file is empty.", file=path, remedy="download or export it again")
    pickled = head[:1] == b"\x80" and head[1:2] in b"\x02\x03\x04\x05"  # or a safetensors header of 640, 896, .. bytes
    if head[:4] == b"PK\x03\x04" or (pickled and head[8:9] != b"{"):
        raise _pickle(path)
    length = int.from_bytes(head[:8], "little")
    if size < 9 or head[8:9] not in (b"{", b" "):
        if path.suffix.lower() in _PICKLES:
            raise _pickle(path)
        raise FormatError(
            "The file is not a safetensors file.",
            file=path,
            expected="an 8-byte length and a JSON header",
            found=f"it starts with {head!r}",
        )
    if length > size - 8:
        raise FormatError(
            "The file is cut off or its header is wrong.",
            file=path,
            expected=f"a header of {length} bytes",
            found=f"{size - 8} bytes after its length",
            remedy="download or export it again",
        )
    if length > _MAX_HEADER:
        raise FormatError("The header is too large to be a LoRA's.", file=path, expected=_MAX_HEADER, found=length)


def _pickle(path: Path) -> FormatError:
    return FormatError(
        "This is a pickle, which can run any program when it is opened. It was not opened.",
        file=path,
        expected="a .safetensors file",
        remedy="get the safetensors version, or convert it yourself if you trust its author",
    )


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write one safetensors file atomically: an existing file is replaced when the new one is complete.

    Raises:
        SaveError: The folder is missing or not writable, the disk is full, or a dtype has no safetensors name.
    """
    with _temporary_sibling(path) as temporary:
        with temporary.open("xb") as file:
            _serialise(file, path, tensors, metadata)
            _sync(file)
        temporary.replace(path)


def write_bytes(path: Path, content: bytes) -> None:
    """Write any file atomically, see `write_tensors`."""
    with _temporary_sibling(path) as temporary:
        with temporary.open("xb") as file:
            file.write(content)
            _sync(file)
        temporary.replace(path)


def write_folder(path: Path, writers: Mapping[str, Writer]) -> None:
    """Write the named files of a folder; a new folder appears complete or not at all.

    An existing folder is swapped for the new one, its other files included. Where the system cannot swap folders, the
    files are replaced one by one after all have been written. The last of them is removed first and replaced last:
    a folder that contains it is consistent, whenever the process is interrupted.
    """
    with _temporary_sibling(path) as temporary:
        temporary.mkdir()
        for name, write in writers.items():
            with (temporary / name).open("xb") as file:
                write(file, path / name)
                _sync(file)
        if not path.is_dir():
            temporary.replace(path)
        elif not swap_folders(temporary, path):
            with exclusive_lock(path):  # or weights of one process could end up beside the configuration of another
                _replace_files(temporary, path, list(writers))


def _replace_files(source: Path, target: Path, names: Sequence[str]) -> None:
    last, backup = target / names[-1], source / "replaced"
    if last.exists():
        last.replace(backup)
    try:
        (source / names[0]).replace(target / names[0])
    except OSError:  # e.g. on Windows, where another program has it open: restore the old state
        if backup.exists():
            backup.replace(last)
        raise
    for name in names[1:]:
        (source / name).replace(target / name)


def tensor_writer(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Writer:
    """A `write_folder` writer of a safetensors file."""
    return lambda file, path: _serialise(file, path, tensors, metadata)


def text_writer(text: str) -> Writer:
    """A `write_folder` writer of a UTF-8 text file."""

    def write(file: BinaryIO, path: Path) -> None:
        file.write(text.encode())

    return write


@contextmanager
def _temporary_sibling(path: Path) -> Generator[Path]:
    """A temporary name beside `path`, removed at the end in any case; `OSError` becomes `SaveError`."""
    if not path.parent.is_dir():
        raise SaveError(
            "The output folder does not exist.", file=path, expected=f"a folder {path.parent}", remedy="create it first"
        )
    temporary = temporary_name(path)
    try:
        yield temporary
    except SaveError:
        raise
    except OSError as error:
        raise SaveError(
            "The file could not be written.",
            file=path,
            found=error.strerror or str(error),
            remedy="free space on the disk, or choose a folder that can be written to",
        ) from error
    finally:
        remove(temporary)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _serialise(file: BinaryIO, path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write header and tensors in a fixed order. (The library's own writer needs a second copy of all tensors.)"""
    order = sorted(tensors, key=lambda key: (-tensors[key].dtype.itemsize, key))  # wide dtypes first keep the alignment
    header: dict[str, object] = {"__metadata__": {key: str(metadata[key]) for key in sorted(metadata)}}
    offset = 0
    for key in order:
        tensor = tensors[key]
        if tensor.dtype not in _DTYPES:
            raise SaveError("A tensor's dtype cannot be stored.", file=path, module=key, found=tensor.dtype)
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[key] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise SaveError(
            "A name or a text in the metadata is not Unicode.",
            file=path,
            found=ascii(error.object[error.start - 20 : error.end + 20]),
        ) from error
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for key in order:
        flat = tensors[key].detach().to("cpu").contiguous().reshape(-1)
        file.write(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
