"""Load hosts and, with their functions, models; failures become errors of this package."""

from __future__ import annotations

import importlib
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, Literal

from ..core.errors import FormatError, MergeError


def default_dtype(device: object) -> Literal["float32", "bfloat16"]:
    """Name of the dtype that models compute in on a device, such as ``"cpu"``, unless another is requested."""
    return "float32" if str(device).partition(":")[0] == "cpu" else "bfloat16"


def import_host(module: str, extra: str) -> Any:
    """Import a module of this package whose library may not be installed.

    Args:
        module: Name within `hosts`, such as ``diffusers.mixing``.
        extra: The extra of this package that installs the library.

    Raises:
        MergeError: The library is not installed.
    """
    try:
        return importlib.import_module(f".{module}", __package__)
    except ImportError as error:
        raise MergeError(
            "A library that is needed here is not installed.",
            found=str(error),
            remedy=f"pip install 'legomole[{extra}]'",
        ) from error


@contextmanager
def format_errors(problem: str, path: object, *, expected: str, remedy: str | None = None) -> Generator[None]:
    """Turn every exception inside the block into a FormatError.

    On damaged files the hosts' parsers raise exceptions of any type.

    Args:
        problem, expected, remedy: See `LegoMoleError`.
        path: Folder or name of the model that is loaded.

    Raises:
        FormatError: Something inside the block failed; `found` is the first line of what it raised.
    """
    try:
        yield
    except Exception as error:
        found = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise FormatError(problem, file=path, expected=expected, found=found, remedy=remedy) from error
