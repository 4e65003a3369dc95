"""Recipes as YAML, TOML and plain data. Recipes may come from untrusted files."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import ValidationError

from ..json_text import is_shallow
from .recipe import Input, Recipe, RecipeError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_CHARACTERS = 512 << 10
"""Longest recipe that is parsed; the YAML parser takes seconds for as many characters."""
_MAX_DEPTH = 8  # a recipe has three levels


def recipe_to_text(recipe: Recipe, kind: Literal["yaml", "toml"] = "yaml") -> str:
    """Return the recipe as the text of a file. `recipe_from_text` reads it back equal."""
    data = recipe.to_dict()
    if kind == "yaml":
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return _to_toml(data)


def recipe_from_text(text: str, kind: Literal["yaml", "toml"], file: object = None) -> Recipe:
    """Parse a recipe.

    Args:
        text: YAML or TOML, as `recipe_to_text` writes it or written by hand.
        kind: Language of `text`.
        file: Named in errors.

    Raises:
        RecipeError: Broken YAML or TOML, an unknown or missing field, or a value of the wrong type.
    """
    if len(text) > MAX_CHARACTERS:
        raise RecipeError(
            "The recipe is too long.", file=file, expected=f"at most {MAX_CHARACTERS} characters", found=len(text)
        )
    try:
        data = yaml.load(text, _ReferenceFreeLoader) if kind == "yaml" else tomllib.loads(text)
        repr(data)  # integers with thousands of digits, possible in base 16, cannot be printed or written
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:  # the parsers pass on what int(), date() and similar raise for malformed scalars
        raise RecipeError(
            f"The recipe is not valid {kind.upper()}.", file=file, found=f"{type(error).__name__}: {error}"
        ) from None
    return recipe_from_data(data, file)


class _ReferenceFreeLoader(yaml.SafeLoader):
    """YAML's safe subset without aliases, with which a short text could expand to an enormous one."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe has no references (&name, *name)")
        self.depth += 1
        if self.depth > 4 * _MAX_DEPTH:
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def recipe_from_data(data: object, file: object = None) -> Recipe:
    """Validate plain data as a recipe, see `recipe_from_text`."""
    if not is_shallow(data, _MAX_DEPTH):
        raise RecipeError("This is not a recipe.", file=file, found="data that is nested too deeply")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            "This is not a recipe.",
            file=file,
            module=field or None,
            expected=first["msg"],
            found=repr(first["input"])[:200],
            remedy=f"a recipe has {', '.join(Recipe.model_fields)}; an input {', '.join(Input.model_fields)}",
        ) from None


def _to_toml(data: Mapping[str, Any]) -> str:
    """TOML for scalars, tables of scalars, and arrays of tables: all that a recipe holds."""
    lines = [
        f"{_toml_key(key)} = {_toml_value(value)}" for key, value in data.items() if not isinstance(value, (dict, list))
    ]
    for key, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{_toml_key(key)}]", *(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in table.items())]
        elif isinstance(table, list):
            for row in table:
                lines += ["", f"[[{_toml_key(key)}]]", *(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in row.items())]
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, str):  # a JSON string is a valid TOML string except for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
