"""Compose a recipe from options, optionally on top of another recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .recipe import Recipe
from .text import recipe_from_data

DEFAULT_METHOD = "lego"


def compose(
    base: Recipe | None = None,
    *,
    inputs: Sequence[Mapping[str, Any]] = (),
    method: str | None = None,
    settings: Mapping[str, Any] | None = None,
    module_weights: Mapping[str, float] | None = None,
    input_module_weights: Sequence[Mapping[str, float]] = (),
    normalize: bool | None = None,
    cap: float | None = None,
    equalize: float | None = None,
    dtype: str | None = None,
    format: str | None = None,
    reader: str | None = None,
    convert_rank: int | None = None,
    base_model: str | None = None,
    file: object = None,
) -> Recipe:
    """Return a recipe: the base's fields, replaced by those that are given.

    Settings of the base are kept only if the method stays the same, the hash of its statistics only if they do, and its
    conversions only if neither `dtype` nor `format` is given.

    Args:
        base: Recipe to start from; default an empty one of the method ``lego``.
        inputs: Fields of `Input` for every adapter; replaces the base's list if it is not empty.
        method: Name in ``METHODS``.
        settings: Settings of the method, by name; those with value ``None`` are not given.
        module_weights: Pattern -> factor for every input; replaces the base's factor of an equal pattern.
        input_module_weights: The same per input, in order; may be shorter than the inputs.
        normalize, cap, equalize, dtype, format, reader: See `Recipe`; ``None`` keeps the base's.
        convert_rank: The same; also replaces those of the base's inputs.
        base_model: `Recipe.base`; ``None`` keeps the base's.
        file: File of the base, named in errors.

    Raises:
        RecipeError: A field of the wrong type, or no inputs.
    """
    data: dict[str, Any] = {"method": DEFAULT_METHOD} if base is None else base.model_dump(exclude_unset=True)
    if inputs:
        data["inputs"] = [dict(entry) for entry in inputs]
    elif convert_rank is not None:
        for entry in data.get("inputs", ()):
            entry.pop("convert_rank", None)
    given = {key: value for key, value in (settings or {}).items() if value is not None}
    if method is not None and method != data["method"]:
        data |= {"method": method, "settings": {}}
        data.pop("statistics_sha256", None)
    if "statistics" in given:
        data.pop("statistics_sha256", None)
    data["settings"] = {**data.get("settings", {}), **given}
    if dtype is not None or format is not None or reader is not None:
        data.pop("conversions", None)
    fields = {
        **{"normalize": normalize, "cap": cap, "equalize": equalize},
        **{"dtype": dtype, "format": format, "reader": reader, "convert_rank": convert_rank},
    }
    if base_model is not None:
        data |= {"base": base_model}
        data.pop("base_fingerprint", None)
    data |= {key: value for key, value in fields.items() if value is not None}
    if module_weights:
        data["module_weights"] = {**data.get("module_weights", {}), **module_weights}
    for entry, weights in zip(data.get("inputs", ()), input_module_weights, strict=False):
        entry["module_weights"] = {**entry.get("module_weights", {}), **weights}
    return recipe_from_data(data, file)
