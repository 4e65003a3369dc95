"""Out-of-memory errors with a clear message."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from .errors import MergeError


@contextmanager
def report_out_of_memory(remedy: str | None = None) -> Generator[None]:
    """Turn an out-of-memory error inside the block into a `MergeError`.

    Args:
        remedy: What the user can do. Without it CUDA's own error passes through: ComfyUI frees memory and tries again
            when it sees that error.

    Raises:
        MergeError: There was not enough memory.
    """
    try:
        yield
    except MemoryError as error:
        raise _out_of_memory(str(error), remedy) from error
    except torch.cuda.OutOfMemoryError as error:
        if remedy is None:
            raise
        raise _out_of_memory(str(error).partition("\n")[0], remedy) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = str(error).partition("DefaultCPUAllocator: ")[2].partition(". Error code")[0]
        raise _out_of_memory(found, remedy) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not allocate main memory (it has no exception class for that)."""
    return "DefaultCPUAllocator" in str(error)


def _out_of_memory(found: str, remedy: str | None) -> MergeError:
    return MergeError(
        "There is not enough memory for this.",
        found=found or None,
        remedy=remedy or "close other programs, or merge fewer or smaller LoRAs at a time",
    )
