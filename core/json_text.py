"""Plain data from strangers: JSON that can only be sound or a `ValueError`, and never too deep to be used."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, cast

_DEEPEST = 64  # levels; what this package writes has five
_HALF = re.compile(r"\\u[dD][89a-fA-F]")


def from_json(text: str) -> Any:
    """The data in a JSON text.

    Raises:
        ValueError: It is not JSON, or nested so deeply that what walks through it would not come back.
    """
    try:
        data = json.loads(text)
    except RecursionError:
        data = None
        too_deep = True
    else:
        too_deep = not is_shallow(data, _DEEPEST)
    if too_deep:
        raise ValueError(f"nested more than {_DEEPEST} levels deep")
    if _HALF.search(text):  # half a character can be escaped in JSON, but neither written nor shown
        data = json.loads(json.dumps(data, ensure_ascii=False).encode("utf-8", "replace"))
    return data


def is_shallow(data: object, levels: int) -> bool:
    """Whether mappings and lists lie within each other at most so many levels deep."""
    if isinstance(data, Mapping):
        data = list(cast("Mapping[object, object]", data).values())
    if not isinstance(data, list):
        return True
    return levels > 0 and all(is_shallow(value, levels - 1) for value in cast("list[object]", data))
