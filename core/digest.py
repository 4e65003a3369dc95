"""Digests of tensors: to tell LoRAs, pictures and models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from .adapter import Adapter


def raw(tensor: Tensor) -> bytes:
    """The numbers of a tensor as float32, the same for equal values on any device."""
    return tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes()


def digest(tensors: Iterable[Tensor], text: str = "") -> str:
    """SHA-256 of the numbers of tensors, in their order, and a text."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(raw(tensor))
    found.update(text.encode())
    return found.hexdigest()


def some_of(weights: Sequence[Tensor]) -> Iterator[Tensor]:
    """A few numbers of a few weights, enough to tell models apart. Sharded ones (FSDP) are put together for it."""
    for weight in weights[:: max(1, len(weights) // 16)]:
        weight = getattr(weight, "full_tensor", lambda whole=weight: whole)()
        if weight.device.type != "meta":
            yield weight.detach().flatten()[:64].clone()  # the memory of weights that FSDP frees must not go to numpy


def identity(adapter: Adapter) -> str:
    """sha256 of the adapter's file, or of its factors where it never was a file."""
    if adapter.source.sha256:
        return adapter.source.sha256
    digest = hashlib.sha256()
    for name, part in sorted(adapter.modules.items()):
        digest.update(f"{name} {part.scale!r}".encode())
        for factor in (part.A, part.B):
            digest.update(raw(factor))
    return digest.hexdigest()
