"""What can go wrong, said so that a user can mend it: where, what was expected, what was found, what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_LONGEST = 2000  # characters of one line of an error; a file may hold names of any length

_Error = TypeVar("_Error", bound="LegoMoleError")


class LegoMoleError(Exception):
    """Base of every error this package raises on bad input.

    Args:
        problem: One sentence: what is wrong.
        file: The file or folder concerned, if any.
        module: The target layer (or key) concerned, if any.
        expected: What would have been right.
        found: What was there instead.
        remedy: What the user can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        module: str | None = None,
        expected: object = None,
        found: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem = problem
        self.file = None if file is None else str(file)
        self.module = module
        self.expected = expected
        self.found = found
        self.remedy = remedy
        super().__init__(self._text())

    def at(self: _Error, file: object, module: str) -> _Error:
        """The same error, about this file and this module."""
        return type(self)(
            self.problem, file=file, module=module, expected=self.expected, found=self.found, remedy=self.remedy
        )

    def _text(self) -> str:
        lines = [self.problem]
        for label in ("file", "module", "expected", "found"):
            value = getattr(self, label)
            if value is not None:
                lines.append(f"  {label + ':':<10}{_short(str(value))}")
        if self.remedy is not None:
            lines.append(f"  {'to do:':<10}{self.remedy}")
        return "\n".join(lines)


class FormatError(LegoMoleError, ValueError):
    """A file or state dict that cannot be read as a LoRA."""


class MergeError(LegoMoleError, ValueError):
    """Adapters or settings that cannot be merged."""


class SaveError(LegoMoleError, OSError):
    """An output that could not be written; nothing was left behind."""


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}.. ({len(text)} characters)"


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Join a few names for an error text: ``a, b, c, d, e and 37 more``."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
