"""Running out of memory as an error that says so."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch

from .errors import MergeError


@contextmanager
def report_out_of_memory(remedy: str | None = None) -> Generator[None]:
    """Turn a lack of memory inside the block into an error of ours.

    Args:
        remedy: What a user can do about it who sees this error. Without it a graphics card's own error passes through:
            programs with a page free memory and try again when they see it.

    Raises:
        MergeError: The memory did not suffice.
    """
    try:
        yield
    except MemoryError as error:
        raise _short(str(error), remedy) from error
    except torch.cuda.OutOfMemoryError as error:
        if remedy is None:
            raise
        raise _short(str(error).partition("\n")[0], remedy) from error
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        found = str(error).partition("DefaultCPUAllocator: ")[2].partition(". Error code")[0]
        raise _short(found, remedy) from error


def is_out_of_memory(error: RuntimeError) -> bool:
    """Whether torch could not get main memory (it has no class of its own for that)."""
    return "DefaultCPUAllocator" in str(error)


def _short(found: str, remedy: str | None) -> MergeError:
    return MergeError(
        "There is not enough memory for this.",
        found=found or None,
        remedy=remedy or "close other programs, or merge fewer or smaller LoRAs at a time",
    )
