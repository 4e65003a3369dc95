"""The base model that gates belong to: its name, a digest of its weights, and errors about LoRAs of other models."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from ..core.adapter import Adapter
from ..core.digest import digest, some_of
from ..core.errors import MergeError, name_some
from ..core.mole.scopes import uncompiled


def base_model_name(model: nn.Module) -> str:
    """Class name of a model, compiled or not: the base model that a file of gates names."""
    return type(uncompiled(model)).__name__


def weights_digest(model: nn.Module) -> str:
    """SHA-256 of a sample of a model's weights, which tells trainings on different models apart."""
    return digest(some_of(list(model.parameters())))


def other_base_model(adapter: Adapter, missing: Sequence[str], model: nn.Module, remedy: str) -> MergeError:
    """The error for an adapter with modules (`missing`) that are not in the model."""
    return MergeError(
        "The LoRA was made for another base model.",
        file=adapter.source.path or adapter.label,
        expected=f"layers of {base_model_name(model)}",
        found=f"{len(missing)} layers that the model lacks, such as {name_some(missing, 2)}",
        remedy=remedy,
    )
