"""Fields that convert what they are given."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Mapping
from dataclasses import FrozenInstanceError, dataclass, field, fields, replace

import pytest
from legomole.core.fields import REQUIRED, Converted, ReadOnly, is_required, read_only


def halves(value: int | str) -> float:
    return float(value) if isinstance(value, (str, float)) else value / 2


@dataclass(frozen=True)
class Example:
    names: Converted[Mapping[str, int], Mapping[str, int]] = Converted(read_only)
    size: Converted[int | str, float] = Converted(halves, 3)
    more: ReadOnly[str, int] = Converted(read_only, None)
    other: int = field(default=7)


def test_values_and_defaults_are_converted():
    example = Example({"a": 1})
    assert (example.size, example.more, example.other) == (1.5, {}, 7)
    assert Example({}, "4", {"b": 2}).size == 4.0
    assert example == Example({"a": 1}, "1.5", {}, 7)
    assert repr(example).startswith("Example(names=mappingproxy({'a': 1}), size=1.5")


def test_a_field_without_default_is_required():
    with pytest.raises(TypeError, match="names"):
        Example()  # type: ignore[call-arg]
    assert [f.name for f in fields(Example) if is_required(f)] == ["names"]


def test_the_dataclass_stays_frozen_and_mappings_are_copies():
    names = {"a": 1}
    example = Example(names)
    names["b"] = 2
    assert example.names == {"a": 1}
    with pytest.raises(TypeError):
        example.names["c"] = 3  # type: ignore[index]
    with pytest.raises(FrozenInstanceError):
        example.size = 4  # type: ignore[misc]


def test_copies():
    example = Example({"a": 1}, 8)
    assert replace(example) == copy.copy(example) == example
    assert replace(example, size=4) == Example({"a": 1}, 4)


@dataclass(frozen=True)
class Plain:
    size: Converted[int | str, float] = Converted(halves, 3)
    after: str = REQUIRED


def test_pickles():
    assert pickle.loads(pickle.dumps(Plain("4", "x"))) == Plain("4", "x")
    assert hash(Plain(8, "x")) == hash(Plain("4", "x"))


def test_required_after_a_default():
    assert [is_required(f) for f in fields(Plain)] == [False, True]
    assert "after='x'" in repr(Plain(after="x"))
    assert "REQUIRED" in repr(Plain())
