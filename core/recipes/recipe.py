"""Recipe: the description of a merge, to be shared, stored in the merged file's metadata, and repeated."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from .. import __version__
from ..errors import LegoMoleError
from .dtype_names import full_dtype_name

DtypeName = Literal["float32", "float16", "bfloat16"]
ReaderName = Literal["comfy", "diffusers", "kohya", "peft"]  # `Reader` of the families, whose tables take time to load
HUB_PREFIX = "hf://"
"""Prefix of the path of an input that is looked up in the local Hugging Face cache."""


class RecipeError(LegoMoleError, ValueError):
    """A recipe that cannot be read, or whose inputs differ from those it was written for."""


class Input(BaseModel):
    """One adapter of a recipe.

    Args:
        path: File or folder, relative to the recipe's folder; or ``hf://OWNER/NAME[@REVISION]``, an adapter in the
            local Hugging Face cache.
        sha256: Hash of the weight file; ``""`` accepts any file.
        weight: Merge weight; a negative one subtracts.
        text_encoder_weight: Weight of the text encoder modules; default `weight`.
        module_weights: Pattern of module names -> factor on the weight of matching modules.
        convert_rank: As in `Recipe`, for this input alone; default the recipe's.
        in_memory: The adapter was no file, and `path` is only its label. Such a recipe cannot be run.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: str
    sha256: str = ""
    weight: float = 1.0
    text_encoder_weight: float | None = None
    module_weights: dict[str, float] = Field(default_factory=dict)
    convert_rank: int | None = Field(default=None, ge=1)
    in_memory: bool = False


class Conversion(BaseModel):
    """A conversion of a merged file.

    Args:
        format: File format of the result.
        reader: Program whose names the layers get; default those of the file before, or the format's if it is another.
        dtype: Dtype of its factors and diffs; default that of the file before.
        from_folder: The file before was a PEFT folder, which has a configuration, and not a single file.
        only: Patterns of the layers that were kept, see `layers_matching`; default all.
        cap: Limit of singular values, see `merge`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    reader: ReaderName | None = None
    dtype: DtypeName | None = None
    from_folder: bool = False
    only: str | None = None
    cap: float | None = Field(default=None, ge=1)


class Recipe(BaseModel):
    """A merge: its inputs and how they are merged. Equal recipes give equal bytes.

    Args:
        legomole: Version that wrote the recipe.
        method: A name in ``METHODS``.
        settings: The method's hyperparameters by name, its seed included; missing ones have their default. The
            statistics of a calibrated merge are a path.
        inputs: The adapters, at least one.
        module_weights: Pattern of module names -> factor, for every input that has matching modules.
        normalize: Divide the weights by the sum of their magnitudes, see `merge`.
        cap, equalize: Limit of singular values, and share by which the loudness is brought together, see `merge`.
        dtype: Dtype of the result; default the widest of the inputs'. ``bf16``, ``fp16`` and ``fp32`` are read too.
        format: File format; default that of the first input if it can name all merged modules.
        reader: Program that shall read the file and decides the layers' names: ``comfy``, ``diffusers``, ``kohya`` or
            ``peft``. Default: that of the format if one is given; else the inputs' names where they agree, and
            ComfyUI's where they do not.
        convert_rank: Rank at which LoHa, LoKr and full differences are approximated, see `load`.
        base: The base model, a checkpoint or a folder, for inputs that are DoRA; they need a `convert_rank` too.
        base_fingerprint: Hash of the sizes and of parts of its files; ``""`` accepts any.
        statistics_sha256: Hash of the statistics file; ``""`` accepts any.
        conversions: Conversions of the merged file, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    legomole: str = __version__
    method: str
    settings: dict[str, Any] = Field(default_factory=dict)
    inputs: list[Input] = Field(min_length=1)
    module_weights: dict[str, float] = Field(default_factory=dict)
    normalize: bool = False
    cap: float | None = Field(default=None, ge=1, allow_inf_nan=False)
    equalize: float = Field(default=0.0, ge=0, le=1)
    dtype: DtypeName | None = None
    format: str | None = None
    reader: ReaderName | None = None
    convert_rank: int | None = Field(default=None, ge=1)
    base: str | None = None
    base_fingerprint: str = ""
    statistics_sha256: str = ""
    conversions: list[Conversion] = Field(default_factory=list, max_length=100)

    @property
    def final_format(self) -> str | None:
        """File format after all conversions; ``None`` if the recipe leaves it open."""
        return self.conversions[-1].format if self.conversions else self.format

    @field_validator("dtype", mode="before")
    @classmethod
    def _full_dtype_name(cls, value: object) -> object:
        return full_dtype_name(value) if isinstance(value, str) else value

    def to_dict(self) -> dict[str, Any]:
        """Plain data without the fields that have their default; versions, paths and weights are always included."""
        data = self.model_dump(exclude_defaults=True)
        inputs = [
            {"path": entry.path, "weight": entry.weight} | row
            for entry, row in zip(self.inputs, data["inputs"], strict=True)
        ]
        return {"legomole": self.legomole, **data, "inputs": inputs}
