"""Hashes of tensors, to tell LoRAs, images and models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import count
from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .adapter import Adapter

_numbers = WeakTensorKeyDictionary()  # tensor -> its number
_new_number = count()
_numbers_lock = Lock()


def raw(tensor: Tensor) -> bytes:
    """The values of a tensor as float32, the same for equal values on any device."""
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """SHA-256 of the shapes and values of tensors, in their order, and a text."""
    hasher = hashlib.sha256()
    for tensor in tensors:
        hasher.update(f"{tuple(tensor.shape)}".encode())
        hasher.update(raw(tensor))
    hasher.update(text.encode())
    return hasher.hexdigest()


def content_hash(tensor: Tensor) -> bytes:
    """SHA-256 of dtype, shape and values of a tensor."""
    hasher = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)}".encode())
    hasher.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return hasher.digest()


def content_key(tensor: Tensor) -> Hashable:
    """A value that stays equal while the tensor lives and no torch operation writes to it; no other tensor has it.

    The values are not read, except those of a tensor of inference mode: torch does not count what is written to it.
    """
    if tensor.is_inference():
        return content_hash(tensor)
    with _numbers_lock:
        number = _numbers.get(tensor)
        if number is None:
            number = _numbers[tensor] = next(_new_number)
    return number, tensor._version


def some_of(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """A few values of a few weights, enough to tell models apart. Sharded weights (FSDP) are gathered for it."""
    for weight in weights[:: max(1, len(weights) // 16)]:
        weight = getattr(weight, "full_tensor", lambda whole=weight: whole)()
        if weight.device.type != "meta":
            yield weight.detach().flatten()[:64].clone()  # the memory of weights that FSDP frees must not go to numpy


def identity(adapter: Adapter) -> str:
    """Hash that tells an adapter from every other, as 64 hexadecimal digits.

    It is the sha256 of the adapter's file. If updates of the file were approximated, the rank of that counts too; if
    the adapter never was a file, it is a hash of its low-rank updates.
    """
    source = adapter.source
    if source.sha256 and source.convert_rank:
        return digest([], f"{source.sha256} convert_rank={source.convert_rank}")
    if source.sha256:
        return source.sha256
    parts = sorted(adapter.modules.items())
    described = repr([(name, part.scale, part.kernel) for name, part in parts])
    return digest((factor for _, part in parts for factor in (part.A, part.B)), described)
