"""from_json(): untrusted JSON gives plain data or a ValueError."""

from __future__ import annotations

import json

import pytest
from legomole.core.json_text import from_json, is_shallow


def test_ordinary_data_equals_that_of_the_json_module() -> None:
    data = {"a": [1, 2.5, None, {"b": "é \U0001f600", "c": [[]]}], "": True}
    assert from_json(json.dumps(data)) == data == from_json(json.dumps(data, ensure_ascii=False))


@pytest.mark.parametrize("text", ["", "{", "[1,]", "nul", '{"a": 1', "9" * 5000])
def test_what_is_not_json(text: str) -> None:
    with pytest.raises(ValueError):
        from_json(text)


@pytest.mark.parametrize("levels", [65, 900, 100_000])
@pytest.mark.parametrize(("opening", "closing"), [("[", "]"), ('{"a":', "}")])
def test_too_many_levels(levels: int, opening: str, closing: str) -> None:
    """Both texts that the parser refuses and texts that it accepts, whose data breaks recursive code."""
    with pytest.raises(ValueError, match="64 levels"):
        from_json(opening * levels + "1" + closing * levels)
    assert from_json(opening * 64 + "1" + closing * 64)


def test_levels_are_counted() -> None:
    assert is_shallow(1, 0)
    assert not is_shallow([], 0)
    assert is_shallow([{"a": 1}], 2)
    assert not is_shallow([{"a": [1]}], 2)


def test_a_lone_surrogate_is_replaced() -> None:
    assert from_json('{"\\ud83d\\ude00": "\\ud800x"}') == {"\U0001f600": "?x"}
