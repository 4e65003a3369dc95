"""Digests of tensors: to tell LoRAs, pictures and models apart."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor


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
