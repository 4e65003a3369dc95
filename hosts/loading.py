"""Loading models with a host's own functions: whatever these raise becomes a FormatError about the folder."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from ..core.errors import FormatError


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
