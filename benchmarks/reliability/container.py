"""Safetensors files from entries to bytes without any check, so that headers may be wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

SIZES = {
    **{"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "I16": 2, "U16": 2, "F16": 2, "BF16": 2},
    **{"I32": 4, "U32": 4, "F32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8},
}  # bytes per element


class Raw(str):
    """JSON text that is written unchanged, valid or not."""

    __slots__ = ()


def dumps(value: Any) -> str:
    """Format as JSON; `Raw` text is kept, and `Pairs` may contain a key twice."""
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{dumps(key)}:{dumps(item)}" for key, item in value) + "}"
    if isinstance(value, Mapping):
        return dumps(Pairs(value.items()))
    if isinstance(value, (list, tuple)):
        return "[" + ",".join(map(dumps, value)) + "]"
    return json.dumps(value)


class Pairs(list[Any]):
    """Entries of a JSON object, in order."""


@dataclass
class Entry:
    """One tensor.

    Args:
        key: Name. dtype, shape: Values in the header. data: Bytes.
        header: Values that replace those of the header's entry.
    """

    key: Any
    dtype: str
    shape: list[int]
    data: bytes
    header: dict[str, Any] = field(default_factory=dict)


@dataclass
class Container:
    """A file to write.

    Args:
        entries: Tensors. metadata: Value of the header's ``__metadata__``, ``None`` for none.
        head: Bytes after the header. tail: Bytes after the body. length: Value of the header's length field.
    """

    entries: list[Entry]
    metadata: Any = field(default_factory=dict)
    head: bytes = b""
    tail: bytes = b""
    length: int | None = None

    def to_bytes(self) -> bytes:
        pairs, body, offset = Pairs(), bytearray(), 0
        if self.metadata is not None:
            pairs.append(("__metadata__", self.metadata))
        for entry in self.entries:
            end = offset + len(entry.data)
            described = {"dtype": entry.dtype, "shape": entry.shape, "data_offsets": [offset, end], **entry.header}
            pairs.append((entry.key, described))
            body += entry.data
            offset = end
        header = dumps(pairs).encode("utf-8", "surrogatepass") + self.head
        length = len(header) if self.length is None else self.length
        return length.to_bytes(8, "little", signed=False) + header + bytes(body) + self.tail


def tensor(key: Any, shape: Sequence[int], data: bytes | None = None, dtype: str = "F32", seed: int = 1) -> Entry:
    """Return an entry with small generated values, or with `data` repeated to the size of the shape."""
    size = math.prod(shape) * SIZES[dtype]
    if data is None:  # 0.5 .. 1.0 in float32, finite values in all other dtypes
        data = b"".join(bytes((i * seed * 37 % 251, i % 256, i * seed % 127, 0x3F)) for i in range(64))
    return Entry(key, dtype, list(shape), (data * (size // max(1, len(data)) + 1))[:size])


def read(path: Path) -> Container:
    """Parse a valid file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    metadata = header.pop("__metadata__", {})
    return Container(
        [
            Entry(key, described["dtype"], described["shape"], body[slice(*described["data_offsets"])])
            for key, described in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0])
        ],
        metadata,
    )
