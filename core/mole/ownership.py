"""Ownership of tensors: whether a tensor may be overwritten because nothing else refers to it or to its memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

# Number of tensors that share a storage. Builds of PyTorch without it (older ones for CPUs) never overwrite.
_storage_use_count: Callable[[int], int] | None = getattr(torch._C, "_storage_Use_Count", None)


def is_only_reference(holder: Sequence[Any]) -> bool:
    """Whether `holder` alone refers to the tensor in it, so that overwriting the tensor changes nothing else.

    The caller must not keep another reference, not even in a local variable. Reference counts are compared with those
    of new tensors: of the Python object, of the tensor it is a view of, and of the storage, which also finds the views
    that autograd does not track (in inference mode, after ``detach``). Answers no where it cannot know: for memory that
    PyTorch did not allocate (NumPy's), for subclasses of Tensor, and while a model is compiled.

    Args:
        holder: One tensor, e.g. what a layer returned, received in a list.
    """
    if torch.compiler.is_compiling():
        return False
    counts = _reference_counts(holder)
    return counts is not None and counts in _COUNTS_OF_NEW_TENSORS


def _reference_counts(holder: Sequence[Any]) -> tuple[int, int, int] | None:
    """Python references to the tensor, tensors that share its storage, and Python references to its base (or 0)."""
    y = holder[0]
    if type(y) is not Tensor or _storage_use_count is None:
        return None
    try:
        storage = y.untyped_storage()
    except NotImplementedError:  # inside torch.func.vmap
        return None
    if not storage.resizable():
        return None
    base = None if y.is_inference() else y._base
    return sys.getrefcount(y), _storage_use_count(storage._cdata), 0 if base is None else sys.getrefcount(base)


def _counts_of_new_tensors() -> frozenset[tuple[int, int, int] | None]:
    """The counts of a new tensor, and of a view of one (a linear layer may return either).

    They are measured, because versions of Python and PyTorch count differently.
    """
    with torch.inference_mode(False), torch.no_grad():
        new, view = [torch.empty(1, device="cpu")], [torch.empty(1, device="cpu").view(1, 1)]
        return frozenset((_reference_counts(new), _reference_counts(view)))


_COUNTS_OF_NEW_TENSORS = _counts_of_new_tensors()
