"""Trained gates as a value and as a file: the gates, the LoRAs and the kind of model they were trained for."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from ..adapter import Adapter, check_finite
from ..digest import identity
from ..errors import FormatError, MergeError
from ..formats.files import read_tensors, write_tensors
from ..json_text import from_json
from .concepts import ConceptDetector
from .gates import Gate, GateSet, GateSettings

_KIND = "legomole.gates.2"
_FIRST_KIND = "legomole.gates.1"  # its gates that read ``text`` read the mean over tokens
_NETWORK = "(network)"  # a tensor's name needs something before the slash
_DETECTOR = "(detector)"


class Expert(BaseModel):
    """A LoRA that gates were trained for.

    Args:
        label: Its name for users. sha256: Hash of its file, or of its factors if it was never a file.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    label: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")

    @classmethod
    def of(cls, adapter: Adapter) -> Expert:
        return cls(label=adapter.label, sha256=identity(adapter))


@dataclass(frozen=True, eq=False)
class _TrainedGatesFields:
    gates: GateSet
    experts: tuple[Expert, ...]
    base: str
    training: Mapping[str, Any]


class TrainedGates(_TrainedGatesFields):
    """Gates and what they were trained for. Immutable: ComfyUI caches it and passes it to several nodes.

    Args:
        gates: The gates.
        experts: The LoRAs, in the gates' order.
        base: The kind of model they were trained on, as its host names it; ``""`` if unknown.
        training: Record of the training: objective, steps, seed, prompts, losses ...; plain data for JSON.
    """

    def __init__(
        self,
        gates: GateSet,
        experts: Sequence[Expert],
        base: str = "",
        training: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(gates, tuple(experts), base, MappingProxyType(dict(training or {})))

    def of(self, adapters: Sequence[Adapter], base: str = "") -> GateSet:
        """The gates for these LoRAs, identified by their hashes; LoRAs that are missing are switched off.

        Args:
            adapters: The LoRAs to mix, each once, in any order.
            base: The kind of model to mix them on; ``""`` accepts any.

        Raises:
            MergeError: A LoRA that the gates were not trained with, or another kind of model.
        """
        if base and self.base and base != self.base:
            raise MergeError(
                "The gates were trained on another kind of model.",
                expected=self.base,
                found=base,
                remedy="connect the model they were trained on, or train gates for this one",
            )
        order: list[int] = []
        for adapter in adapters:
            sha256 = Expert.of(adapter).sha256
            matches = [i for i, expert in enumerate(self.experts) if expert.sha256 == sha256 and i not in order]
            if not matches:
                raise MergeError(
                    "The gates were trained with other LoRAs.",
                    file=adapter.source.path or adapter.label,
                    expected=", ".join(f"{e.label} ({e.sha256[:12]})" for e in self.experts),
                    found=f"{adapter.label} ({sha256[:12]})",
                    remedy="connect exactly the files the gates were trained with (in any order), or train again",
                )
            order.append(matches[0])
        return self.gates.select(order)

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for users about the limits of these gates."""
        if self.gates.settings.reads != "text-mean":
            return ()
        return (
            "these gates read the mean of the text over all tokens and close when a prompt gets longer; "
            "gates that are trained again read it token by token",
        )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, atomically. Tensors are named ``<scope>/weight``, ``/bias`` ...

        Raises:
            SaveError: See `core.formats.files.write_tensors`; nothing is left behind.
        """
        tensors, header = self.to_tensors()
        write_tensors(Path(path), tensors, header)

    def to_tensors(self) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors by name, and the metadata, as `save` writes them."""
        tensors: dict[str, Tensor] = {}
        for scope in self.gates.names:
            for name, tensor in self.gates[scope].state_dict().items():
                tensors[f"{scope or _NETWORK}/{name}"] = tensor
        detector = self.gates.detector
        if detector is not None:
            tensors |= {f"{_DETECTOR}/{name}": tensor for name, tensor in detector.state_dict().items()}
        header = {
            "kind": _KIND,
            "words": json.dumps(None if detector is None else detector.words),
            "scopes": json.dumps({name: self.gates[name].layer for name in self.gates.names}),
            "experts": json.dumps([expert.model_dump() for expert in self.experts]),
            "settings": self.gates.settings.model_dump_json(),
            "base": self.base,
            "training": json.dumps(dict(self.training)),
        }
        return tensors, header

    @classmethod
    def load(cls, path: str | Path) -> TrainedGates:
        """Read a file that `save` wrote.

        Raises:
            FormatError: Another kind of file, or a damaged one.
        """
        return cls.from_tensors(*read_tensors(Path(path)), path)

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], header: Mapping[str, str], path: object) -> TrainedGates:
        """The gates from the tensors and metadata of a file at `path`.

        Raises:
            FormatError: See `load`.
        """
        kind = header.get("kind")
        if kind not in (_KIND, _FIRST_KIND):
            raise FormatError(
                "This file holds no gates.",
                file=path,
                expected=f"metadata kind {_KIND}",
                found=kind or "none",
                remedy="choose a file that Save Gates or `legomole train-gates` wrote",
            )
        try:
            settings = GateSettings.model_validate_json(header["settings"])
            if kind == _FIRST_KIND and settings.reads == "text":
                settings = settings.model_copy(update={"reads": "text-mean"})
            experts = tuple(Expert.model_validate(entry) for entry in from_json(header["experts"]))
            scopes = {str(scope): str(layer) for scope, layer in dict(from_json(header["scopes"])).items()}
            gates = {
                scope: _gate(tensors, scope, layer, len(experts), settings, path) for scope, layer in scopes.items()
            }
            training = dict(from_json(header["training"]))
            detector = _detector(tensors, header.get("words", "null"), path)
            gate_set = GateSet(len(experts), settings, gates, detector)
            return cls(gate_set, experts, header.get("base", ""), training)
        except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
            if isinstance(error, FormatError):
                raise
            raise FormatError(
                "The gates could not be read.",
                file=path,
                found=f"{type(error).__name__}: {error}",
                remedy="the file is damaged: train and save the gates again",
            ) from error


def _detector(tensors: Mapping[str, Tensor], words: str, path: object) -> ConceptDetector | None:
    names: list[list[str]] | None = from_json(words)
    if names is None:
        return None
    weight, bias = (tensors[f"{_DETECTOR}/{name}"] for name in ("weight", "bias"))
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_finite(tensor, f"{_DETECTOR}/{name}", str(path))
    return ConceptDetector(weight.clone(), bias.clone(), [[str(word) for word in row] for row in names])


def _gate(
    tensors: Mapping[str, Tensor], scope: str, layer: str, experts: int, settings: GateSettings, path: object
) -> Gate:
    prefix = f"{scope or _NETWORK}/"
    state = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    for name, tensor in state.items():
        if tensor.is_floating_point():
            check_finite(tensor, f"{prefix}{name}", str(path))
    owner = state["owner"].clone() if "owner" in state else None  # the other tensors are copied by load_state_dict
    rows, shape = experts + (settings.activation == "softmax-null"), tuple(state["weight"].shape)
    if len(shape) != 2 or shape[0] != rows or shape[1] == 0:  # checked before memory is allocated for it
        raise ValueError(f"{prefix}weight has the shape {shape}, not ({rows}, features)")
    if owner is not None and not (owner.dtype == torch.long and bool(((owner >= 0) & (owner < experts)).all())):
        raise ValueError(f"{prefix}owner does not hold indices of LoRAs")
    if not bool((state["spread"].float() > 0).all()):
        raise ValueError(f"{prefix}spread is not positive")
    gate = Gate(state["weight"].shape[1], experts, settings, owner=owner, layer=layer)
    with torch.no_grad():
        gate.load_state_dict(state)
    return gate
