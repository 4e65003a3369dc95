"""Fields of dataclasses that convert the values they are given, in frozen dataclasses too."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, Generic, TypeAlias, TypeVar, overload

_Given = TypeVar("_Given")
_Stored = TypeVar("_Stored")
_Key = TypeVar("_Key")
_Value = TypeVar("_Value")


class Converted(Generic[_Given, _Stored]):
    """A field that stores what a function makes of the given value.

    ``rank: Converted[int | str, Rank] = Converted(Rank.parse, 16)`` accepts ``"1.5x"`` and reads as a `Rank`.

    Args:
        convert: The function. Its result must convert to itself, for `dataclasses.replace`.
        default: The default, if the field has one: any value that can be given.

    Source: Python's documentation of dataclasses, "Descriptor-typed fields".
    """

    def __init__(self, convert: Callable[[_Given], _Stored], *default: _Given) -> None:
        self._convert, self._default = convert, default

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    @overload
    def __get__(self, instance: None, owner: type) -> _Given: ...
    @overload
    def __get__(self, instance: object, owner: type) -> _Stored: ...
    def __get__(self, instance: object | None, owner: type) -> _Given | _Stored:
        if instance is not None:
            return vars(instance)[self._name]
        if not self._default:
            raise AttributeError(self._name)  # tells `dataclass` that the field has no default
        return self._default[0]

    def __set__(self, instance: object, value: _Given) -> None:
        vars(instance)[self._name] = self._convert(value)


def read_only(mapping: Mapping[_Key, _Value] | None) -> Mapping[_Key, _Value]:
    """A copy that cannot be written to; ``None`` stands for an empty mapping."""
    return MappingProxyType(dict(mapping or {}))


ReadOnly: TypeAlias = Converted["Mapping[_Key, _Value] | None", "Mapping[_Key, _Value]"]
"""A field for a mapping, of which it stores a read-only copy: ``ReadOnly[str, int] = Converted(read_only, None)``."""


class _Required:
    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED: Any = _Required()
"""The default of a field that must be given although it follows a field with a default. Its dataclass checks that."""


def is_required(field: dataclasses.Field[Any]) -> bool:
    """Whether a field of a dataclass must be given."""
    return field.default in (dataclasses.MISSING, REQUIRED) and field.default_factory is dataclasses.MISSING
