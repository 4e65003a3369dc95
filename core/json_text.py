"""JSON from untrusted files: parsing succeeds or raises `ValueError`, and the data is never nested too deeply."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

_MAX_LEVELS = 64  # this package writes five at most
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def from_json(text: str) -> Any:
    """Parse a JSON text.

    Raises:
        ValueError: The text is not JSON, or is nested so deeply that recursion over the data could fail.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        data = None
        too_deep = True
    else:
        too_deep = not is_shallow(data, _MAX_LEVELS)
    if too_deep:
        raise ValueError(f"nested more than {_MAX_LEVELS} levels deep")
    if _SURROGATE.search(text):  # a lone surrogate can be escaped in JSON, but cannot be encoded or displayed
        data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    return data


def is_shallow(data: object, levels: int) -> bool:
    """Whether mappings and lists are nested at most `levels` deep."""
    if isinstance(data, Mapping):
        data = list(cast("Mapping[object, object]", data).values())
    if not isinstance(data, list):
        return True
    return levels > 0 and all(is_shallow(value, levels - 1) for value in cast("list[object]", data))
