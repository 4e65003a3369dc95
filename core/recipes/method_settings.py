"""A merge method from its name and settings, and the settings of a merge method as plain data."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from ..fields import Converted, is_required
from ..merge.methods import METHODS, MergeMethod
from ..merge.rank import Rank
from ..merge.statistics import Statistics
from .recipe import Recipe, RecipeError

UNSAVED_STATISTICS = "statistics that were not saved"


def build_method(name: str, settings: Mapping[str, Any]) -> MergeMethod:
    """Instantiate a row of ``METHODS``, with each setting validated.

    Args:
        name: Name in ``METHODS``.
        settings: Field name -> value; a rank as an integer or text (``"1.5x"``, ``"95%"``), statistics loaded.

    Raises:
        RecipeError: An unknown method or setting, a missing setting, or a value of the wrong type.
        MergeError: A value out of range.
    """
    if name not in METHODS:
        raise RecipeError("There is no such method.", expected=", ".join(METHODS), found=name)
    method: Any = METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(method)}
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise RecipeError(
            f"The method {name} has no such setting.",
            expected=", ".join(fields) or "no settings",
            found=", ".join(unknown),
        )
    missing = [key for key, field in fields.items() if key not in settings and is_required(field)]
    if missing:
        raise RecipeError(
            f"The method {name} needs a setting.",
            expected=", ".join(missing),
            found="nothing",
            remedy="measure the statistics first, see docs/calibrated.md" if "statistics" in missing else None,
        )
    hints = typing.get_type_hints(method)
    return method(**{key: _validated(name, key, hints[key], value) for key, value in settings.items()})


def takes_statistics(name: str) -> bool:
    """Whether the method ``name`` uses statistics."""
    return any(field.name == "statistics" for field in dataclasses.fields(typing.cast(Any, METHODS[name])))


def with_statistics(recipe: Recipe, path: Path | None) -> Recipe:
    """The recipe with the path of measured statistics, if its method uses any and they are in a file."""
    if path is None or not takes_statistics(recipe.method):
        return recipe
    settings = {**recipe.settings, "statistics": str(path)}
    return recipe.model_copy(update={"settings": settings, "statistics_sha256": ""})


def _validated(method: str, key: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Converted:  # the field converts and checks the value itself
        return value
    if isinstance(value, Statistics) and Statistics in (hint, *typing.get_args(hint)):
        return value
    try:
        return TypeAdapter(hint).validate_python(value)
    except ValidationError as error:
        raise RecipeError(
            f"The setting {key} of the method {method} cannot have this value.",
            expected=error.errors()[0]["msg"],
            found=repr(value),
        ) from None


def method_settings(method: MergeMethod) -> dict[str, Any]:
    """Return a method's settings as plain data, defaults included, so that a later change of a default has no effect.

    Settings that are ``None`` (the method decides) are left out. Statistics, which may never have been a file, are
    stored as `UNSAVED_STATISTICS`, a path that does not exist: such a merge cannot be repeated from its recipe.
    """
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, method)):
        value = getattr(method, field.name)
        if isinstance(value, Rank):
            plain[field.name] = str(value) if value.unit else int(value.value)
        elif isinstance(value, Statistics):
            plain[field.name] = UNSAVED_STATISTICS
        elif value is not None:
            plain[field.name] = value
    return plain
