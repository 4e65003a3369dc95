"""``rank_pattern`` and ``alpha_pattern`` of a PEFT configuration: untrusted regular expressions, bounded in time.

Nearly all keys are names of layers: those are looked up in a dict. Other expressions are matched by the `regex`
package, which has a timeout.
"""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import regex

from ..errors import FormatError

_MAX_NAME = 1000  # characters of a key that is looked up
_MAX_SIZE = 100_000  # characters of all expressions of a table, counted repetitions written out
_MAX_SECONDS = 5.0  # processor time to look up all modules in a table
# A key of a fixed length: ordinary characters, escaped ones, and dots, which match any character.
_NAME = re.compile(rf"(\^?)((?:[^\\^$|?*+()\[\]{{}}]|\\\W){{0,{_MAX_NAME}}})\$?")
_ESCAPED = re.compile(r"\\(\W)")
_COUNT = re.compile(r"\{(\d*)")
# Any other brace is literal for `re`, but for `regex` a number of errors. Verbose mode hides counts from _COUNT.
_UNUSUAL = re.compile(r"\{(?!\d*,?\d*\})|\(\?\w*x")


class PatternTable:
    """Values for modules, by the first key for which ``(.*\\.)?(KEY)$`` matches the module's name, as in PEFT.

    Args:
        table: Regular expression -> value, in the order of precedence.

    Raises:
        FormatError: A key is not a regular expression, or the expressions are too large.
    """

    def __init__(self, table: Mapping[str, Any]) -> None:
        self._values = list(table.values())
        # (whether the key begins with ^, text that the key matches with its dots as dots) -> position in the table
        self._names: dict[tuple[bool, str], int] = {}
        # (whether the key begins with ^, length of that text) -> (position, number of dots in it, the expression)
        self._dotted: dict[tuple[bool, int], list[tuple[int, int, str]]] = defaultdict(list)
        self._expressions: list[tuple[int, regex.Pattern[str]]] = []
        self._size = 0.0
        self._seconds = 0.0
        for position, key in enumerate(table):
            match = _NAME.fullmatch(key)
            if match is None:
                self._expressions.append((position, self._compile(key)))
                continue
            anchored, expression = bool(match[1]), match[2]
            text = _ESCAPED.sub(r"\1", expression)
            self._names.setdefault((anchored, text), position)
            if "." in _ESCAPED.sub("", expression):
                self._dotted[anchored, len(text)].append((position, text.count("."), expression))

    def _compile(self, key: str) -> regex.Pattern[str]:
        # `regex` compiles a{1000} to a thousand copies of a
        self._size += len(key) * math.prod(max(1.0, float(count or 1)) for count in _COUNT.findall(key))
        if self._size > _MAX_SIZE or _UNUSUAL.search(key):
            raise FormatError(
                "The patterns in the configuration are too large or too unusual to be matched.",
                expected=f"at most {_MAX_SIZE} characters, no verbose mode, and braces only for counts such as {{1,3}}",
                found=key[:200],
                remedy="name the layers instead",
            )
        expression = rf"(.*\.)?({key})$"
        try:
            re.compile(expression)  # PEFT uses `re`: refuses what only `regex` can do
            return regex.compile(expression)
        except (re.error, regex.error, ValueError, OverflowError, RecursionError) as error:
            raise FormatError("A pattern in the configuration is not a regular expression.", found=key[:200]) from error

    def get(self, module: str, default: Any) -> Any:
        """The value of the first key that matches the module's name.

        Raises:
            FormatError: Looking up the modules has taken too long.
        """
        started = time.thread_time()
        try:
            position = self._position(module)
        except (TimeoutError, MemoryError):  # MemoryError: `regex` limits its stack to 1 GB
            position, self._seconds = 0, math.inf
        self._seconds += time.thread_time() - started
        if self._seconds > _MAX_SECONDS:
            raise FormatError(
                "Matching the patterns in the configuration takes too long.",
                expected=f"at most {_MAX_SECONDS:g} seconds for all modules",
                found=f"{len(self._expressions)} regular expressions among {len(self._values)} keys",
                remedy="name the layers instead",
            )
        return self._values[position] if position < len(self._values) else default

    def _position(self, module: str) -> int:
        """The position of the first key that matches; the length of the table if none does."""
        tail = module[-_MAX_NAME - 1 :]
        endings = [(True, module), (False, module)]  # of a.b.c these, and b.c and c
        endings += [(False, tail[match.end() :]) for match in re.finditer(r"\.", tail)]
        first = min((self._names[ending] for ending in endings if ending in self._names), default=len(self._values))
        for anchored, text in endings:
            real_dots = text.count(".")
            for position, dots, expression in self._dotted.get((anchored, len(text)), ()):
                # with as many dots as the key, the text is the key itself, which was looked up above
                if position < first and real_dots < dots and re.fullmatch(expression, text):
                    first = position
        for position, expression in self._expressions:
            if position > first:
                break
            if expression.match(module, timeout=max(_MAX_SECONDS - self._seconds, 0.001)):
                return position
        return first
