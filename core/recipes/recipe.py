"""Recipe: how a LoRA was merged, as a file to share, in the merged file's metadata, and ready to be repeated."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import typing
from collections.abc import Mapping
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ..errors import LegoMoleError
from ..fields import Converted, is_required
from ..json_text import is_shallow
from ..merge.methods import METHODS, MergeMethod
from ..merge.rank import Rank
from ..merge.statistics import Statistics
from ..version import __version__

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


HUB = "hf://"  # how the path of an input in the local Hugging Face cache begins
MAX_TEXT = 512 << 10  # characters of a recipe; the YAML parser takes seconds for as many
_DEEPEST = 8  # levels; a recipe has three


class RecipeError(LegoMoleError, ValueError):
    """A recipe that cannot be read, or whose inputs are not the ones it was written for."""


class Input(BaseModel):
    """One LoRA of a recipe.

    Args:
        path: File or folder, relative to the recipe's folder; or ``hf://OWNER/NAME[@REVISION]``, an adapter in the
            local Hugging Face cache.
        sha256: Hash of the weight file, ``""`` accepts any.
        weight: Merge weight; negative subtracts.
        text_encoder_weight: Weight of its text encoder modules, default the same.
        module_weights: Pattern of module names -> factor on the weight there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str = ""
    weight: float = 1.0
    text_encoder_weight: float | None = None
    module_weights: dict[str, float] = Field(default_factory=dict)


class Recipe(BaseModel):
    """A merge: what goes in and what is done with it. The same recipe gives the same bytes.

    Args:
        legomole: Version that wrote the recipe.
        method: A name in ``METHODS``.
        settings: The method's hyperparameters by name, the seed among them; those left out keep their default.
            The statistics of a calibrated merge are a path.
        inputs: The LoRAs.
        module_weights: Pattern of module names -> factor, for every input that has such modules.
        normalize: Average instead of sum, see `merge`.
        dtype: Of the result, default the widest of the inputs'.
        format: Of the file, default the first input's if it has names for all layers.
        convert_rank: Allow updates that are not low rank, approximated at this rank.
        statistics_sha256: Hash of a calibrated merge's statistics file, ``""`` accepts any.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    legomole: str = __version__
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: list[Input] = Field(min_length=1)
    module_weights: dict[str, float] = Field(default_factory=dict)
    normalize: bool = False
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    format: str | None = None
    convert_rank: int | None = Field(default=None, ge=1)
    statistics_sha256: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the entries left at their default; versions and weights are always told."""
        data = self.model_dump(exclude_defaults=True)
        inputs = [
            {"path": entry.path, "weight": entry.weight} | row
            for entry, row in zip(self.inputs, data["inputs"], strict=True)
        ]
        return {"legomole": self.legomole, **data, "inputs": inputs}


def build_method(name: str, settings: Mapping[str, Any]) -> MergeMethod:
    """A row of ``METHODS`` with its settings checked one by one.

    Args:
        name: The method.
        settings: Field name -> value; the rank as a number or text (``"1.5x"``, ``"95%"``), statistics loaded.

    Raises:
        RecipeError: An unknown method or setting, one that is missing, or a value of the wrong kind.
        MergeError: A value out of range.
    """
    if name not in METHODS:
        raise RecipeError("There is no such method.", expected=", ".join(METHODS), found=name)
    row: Any = METHODS[name]
    fields = {field.name: field for field in dataclasses.fields(row)}
    unknown = sorted(set(settings) - set(fields))
    if unknown:
        raise RecipeError(
            f"The method {name} has no such setting.",
            expected=", ".join(fields) or "no settings at all",
            found=", ".join(unknown),
        )
    missing = [key for key, field in fields.items() if key not in settings and is_required(field)]
    if missing:
        raise RecipeError(
            f"The method {name} needs a setting.",
            expected=", ".join(missing),
            found="nothing",
            remedy="measure them first, see docs/calibrated.md" if "statistics" in missing else None,
        )
    hints = typing.get_type_hints(row)
    return row(**{key: _checked(name, key, hints[key], value) for key, value in settings.items()})


def _checked(method: str, key: str, hint: Any, value: Any) -> Any:
    if typing.get_origin(hint) is Converted:  # the field itself reads and checks it
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


def settings_of(method: MergeMethod) -> dict[str, Any]:
    """A method's settings as plain data, every one spelled out, so that a later change of a default cannot matter.

    Left out are settings that are ``None`` (the method chooses) and statistics (a file of their own).
    """
    plain: dict[str, Any] = {}
    for field in dataclasses.fields(typing.cast(Any, method)):
        value = getattr(method, field.name)
        if isinstance(value, Rank):
            plain[field.name] = str(value) if value.unit else int(value.value)
        elif value is not None and not isinstance(value, Statistics):
            plain[field.name] = value
    return plain


# ---- as text


def to_text(recipe: Recipe, kind: Literal["yaml", "toml"] = "yaml") -> str:
    """The recipe as a file to share and edit. `from_text` reads it back, equal."""
    data = recipe.to_dict()
    if kind == "yaml":
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=120)
    return _toml(data)


def from_text(text: str, kind: Literal["yaml", "toml"], file: object = None) -> Recipe:
    """Read a recipe.

    Args:
        text: What `to_text` writes, or the like by hand. kind: Its language.
        file: Named in errors.

    Raises:
        RecipeError: Broken YAML or TOML, an unknown or missing entry, a value of the wrong kind.
    """
    if len(text) > MAX_TEXT:
        raise RecipeError("The recipe is too long.", file=file, expected=f"{MAX_TEXT} characters", found=len(text))
    try:
        data = yaml.load(text, _PlainLoader) if kind == "yaml" else tomllib.loads(text)
        repr(data)  # a number of thousands of digits, read in base 16, can be neither shown nor written
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        RecursionError,
    ) as error:
        # the parsers let through what int(), date() and their like say of odd scalars
        raise RecipeError(
            f"The recipe is not valid {kind.upper()}.", file=file, found=f"{type(error).__name__}: {error}"
        ) from None
    return from_dict(data, file)


class _PlainLoader(yaml.SafeLoader):
    """YAML's safe subset without references, by which a short text could stand for an enormous one."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("a recipe has no references (&name, *name)")
        self.depth += 1
        if self.depth > 4 * _DEEPEST:
            raise yaml.YAMLError("nested too deeply")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def from_dict(data: object, file: object = None) -> Recipe:
    """A recipe from plain data, see `from_text`."""
    if not is_shallow(data, _DEEPEST):
        raise RecipeError("This is not a recipe.", file=file, found="data that is nested too deeply")
    try:
        return Recipe.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        raise RecipeError(
            "This is not a recipe.",
            file=file,
            module=place or None,
            expected=first["msg"],
            found=repr(first["input"])[:200],
            remedy=f"a recipe has {', '.join(Recipe.model_fields)}; an input {', '.join(Input.model_fields)}",
        ) from None


def _toml(data: Mapping[str, Any]) -> str:
    """TOML of what a recipe holds: scalars, tables of scalars, and one array of tables."""
    lines = [f"{_key(key)} = {_value(value)}" for key, value in data.items() if not isinstance(value, (dict, list))]
    for key, table in data.items():
        if isinstance(table, dict):
            lines += ["", f"[{_key(key)}]", *(f"{_key(k)} = {_value(v)}" for k, v in table.items())]
        elif isinstance(table, list):
            for row in table:
                lines += ["", f"[[{_key(key)}]]", *(f"{_key(k)} = {_value(v)}" for k, v in row.items())]
    return "\n".join(lines) + "\n"


def _key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else _value(key)


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{_key(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, str):  # a JSON string is a TOML one but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
