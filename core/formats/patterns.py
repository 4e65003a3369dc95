"""Patterns of a PEFT configuration: regular expressions of a stranger's, matched without giving him the time.

PEFT looks for the first key of ``rank_pattern`` (or ``alpha_pattern``) for which ``(.*\\.)?(KEY)$`` matches a layer's
name. Nearly all keys are names with a few dots and escapes: those are looked up. The rest goes to `re`, which is slow
without a limit for some expressions, so only simple ones may.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError

_NAME = re.compile(r"(\^?)((?:[\w\-/]|\.|\\[^\w\s])*)\$?")  # fixed length: letters, any one character, escapes
_PIECE = re.compile(r"\\?.")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]")
_MOST_CHOICES = 4  # quantifiers, and groups, of one expression
_MOST_WORK = 3e9  # steps of all matching, as if every one went wrong; seconds, as it is never that bad


class Patterns:
    """The values that a table of patterns gives to layers.

    Args:
        table: Regular expression -> value, in the order of precedence.

    Raises:
        FormatError: No regular expression, or one that might never come to an end.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._values = list(table.values())
        # (length, places where any character fits) -> name with those places blanked -> position in the table
        self._tails: dict[tuple[int, tuple[int, ...]], dict[str, int]] = defaultdict(dict)
        self._whole: dict[str, int] = {}  # from the start of the layer's name on
        self._others: list[tuple[int, re.Pattern[str], int]] = []
        self._work = 0.0
        for position, key in enumerate(table):
            match = _NAME.fullmatch(key)
            pieces = _PIECE.findall(match[2]) if match else []
            text = "".join(piece[-1] for piece in pieces)
            places = tuple(i for i, piece in enumerate(pieces) if piece == ".")
            if match is None or (match[1] and places):
                self._others.append((position, *_compiled(key)))
            elif match[1]:
                self._whole.setdefault(text, position)
            else:
                self._tails[len(text), places].setdefault(_blanked(text, places), position)

    def get(self, module: str, default: Any) -> Any:
        """The value of the first pattern that matches a layer's name."""
        found = [self._whole[module]] if module in self._whole else []
        for (length, places), names in self._tails.items():
            start = len(module) - length
            if start == 0 or (start > 0 and module[start - 1] == "."):
                position = names.get(_blanked(module[start:], places))
                found += [] if position is None else [position]
        first = min(found, default=len(self._values))
        for position, pattern, choices in self._others:
            if position > first:
                break
            self._work += len(module) ** (1 + choices)
            if self._work > _MOST_WORK:
                raise FormatError(
                    "Matching the configuration's patterns would take too long.",
                    found=f"{len(self._others)} regular expressions, such as {self._others[0][1].pattern[:200]}",
                    remedy="name the layers instead",
                )
            if pattern.match(module):
                first = position
                break
        return self._values[first] if first < len(self._values) else default


def _blanked(text: str, places: tuple[int, ...]) -> str:
    if not places:
        return text
    letters = list(text)
    for i in places:
        letters[i] = "\0"
    return "".join(letters)


def _compiled(key: str) -> tuple[re.Pattern[str], int]:
    """The expression for a whole name, and how many choices it has to try in turn."""
    bare = _CLASS.sub("x", re.sub(r"\\.", "x", key)).replace("(?:", "(")
    choices = len(re.findall(r"[*+?{]", bare)) + bare.count("(")
    # a repeated group, or a look ahead or behind: from there on the time may double with every letter
    if re.search(r"\)[*+{]|\(\?", bare) or re.search(r"\\\d", key) or choices > _MOST_CHOICES or len(key) > 2000:
        raise FormatError(
            "A pattern in the configuration is too involved: matching it might never end.",
            expected=f"a layer's name, or at most {_MOST_CHOICES} of * + ? {{}} () and no group repeated",
            found=key[:200],
            remedy="name the layers instead",
        )
    try:
        return re.compile(rf"(.*\.)?({key})$"), choices
    except (re.error, OverflowError, RecursionError) as error:
        raise FormatError("A pattern in the configuration is not a regular expression.", found=key[:200]) from error
