"""Errors that tell a user where the problem is, what was expected, what was found, and what to do."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

_MAX_LINE = 2000  # characters of one line of an error; names in a file may have any length

_Error = TypeVar("_Error", bound="LegoMoleError")


class LegoMoleError(Exception):
    """Base class of every error that this package raises on bad input.

    Args:
        problem: The problem, in one sentence.
        file: The file or folder concerned, if any.
        module: The target layer (or key) concerned, if any.
        expected: Valid values.
        found: The value found instead.
        remedy: What the user can do.
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
        """The same error for this file and this module."""
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
    """An output that could not be written. Nothing is left behind."""


for _class in (LegoMoleError, FormatError, MergeError, SaveError):
    # programs show the module with the name: without this ComfyUI shows the path of this folder
    _class.__module__ = "legomole"


def _short(text: str) -> str:
    return text if len(text) <= _MAX_LINE else f"{text[:_MAX_LINE]}.. ({len(text)} characters)"


def name_some(names: Iterable[str], limit: int = 5) -> str:
    """Join a few names for an error text: ``a, b, c, d, e and 37 more``."""
    names = list(names)
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
