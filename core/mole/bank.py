"""Bank: what a mixture needs at work on one model, as a module that can be moved and cast like any other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..adapter import is_text_encoder
from ..errors import MergeError, name_some
from ..layers.keymap import Spans
from .gates import GateSet
from .mixture import Mixture
from .scopes import Scope, scopes, uncompiled
from .stack import rows_of, stacks

# What files put before the path of a layer inside its own model.
_PREFIXES = ("diffusion_model.", "transformer.", "unet.", "base_model.model.")
_STACKABLE = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

LayerSlice = tuple[str, int, int, Spans | None]  # path of the layer, first row, last row, row order


class Bank(nn.Module):
    """The stacked experts of every adapted layer, and the gates.

    Args:
        model: The module tree the experts were made for; only looked at.
        mixture: Its gates are copied: training changes the bank's, never the mixture's.
        dtype: Of the stacked factors; default that of each layer's weight where it is a plain floating one.

    Attributes:
        paths: Module name of an expert -> path of the layer it changes.
        stacks: Path of a layer -> its `Stack`. scopes: Path -> where its gate is.
        gates: The gates at work.
        left_out: Parts of the experts that cannot be mixed at run time, each with the reason.

    Raises:
        MergeError: Experts for another model.
    """

    def __init__(self, model: nn.Module, mixture: Mixture, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        model = uncompiled(model)
        places = _places(model, mixture)
        changed = {path for path, *_ in places.values()}
        layers = {path: layer for path, layer in model.named_modules() if path in changed}  # in the model's order
        self.paths = {name: path for name, (path, *_) in places.items()}
        self.stacks = stacks(mixture, layers, places)
        self.scopes: dict[str, Scope] = scopes(model, self.stacks, mixture.gates.settings.granularity)
        self.gates = self._gates(mixture.gates)
        self.mixing, self.experts = mixture.mixing, len(mixture.experts)
        self.left_out = tuple(_left_out(mixture))
        for path, stack in self.stacks.items():
            stack.to(dtype=_dtype(layers[path], dtype))
            self.add_module(path.replace(".", "/"), stack)  # a module's name must not have dots

    def _gates(self, gates: GateSet) -> GateSet:
        """A copy of the gates of what the experts change; an expert that was switched off took its parts with it."""
        known = {scope.name for scope in self.scopes.values()}
        own = {name: gates[name] for name in gates.names if name in known}
        if gates.trained and not own:
            raise MergeError(
                "The gates were trained for other parts of a model than these LoRAs change here.",
                expected=f"parts like {name_some(sorted(name or '(network)' for name in known), 3)}",
                found=f"{len(gates.names)} gates such as {name_some([name or '(network)' for name in gates.names], 3)}",
                remedy="use the gates with the base model and the program they were trained in",
            )
        return GateSet(gates.experts, gates.settings, own).copy()

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Path of a block -> the scopes inside it."""
        found: dict[str, list[str]] = {}
        for scope in self.scopes.values():
            if scope.block:
                inside = found.setdefault(scope.block, [])
                if scope.name and scope.name not in inside:
                    inside.append(scope.name)
        return found

    @property
    def parameters_of_gates(self) -> list[nn.Parameter]:
        """What training changes, and nothing else."""
        return [p for p in self.gates.parameters() if p.requires_grad]


def _places(model: nn.Module, mixture: Mixture) -> dict[str, LayerSlice]:
    """Where every module of the experts sits in the model."""
    paths = {name for name, _ in model.named_modules()}
    found: dict[str, LayerSlice] = {}
    missing: dict[str, list[str]] = {}
    for adapter in mixture.experts:
        for name, update in adapter.modules.items():
            place = mixture.places.get(name)
            if place is not None:
                found[name] = (place.key, place.start, place.stop, place.order)
                continue
            path = _path(name, paths)
            if path is not None:
                found[name] = (path, 0, rows_of(model.get_submodule(path)) or update.d_out, None)
            elif not is_text_encoder(name):
                missing.setdefault(adapter.source.path or adapter.label, []).append(name)
    wrong = [path for path, *_ in found.values() if path not in paths]
    if missing or wrong or not found:
        file, names = next(iter(missing.items()), (None, wrong or ["(text encoder layers only)"]))
        raise MergeError(
            "No layer of the LoRA is in this model." if not found else "The model lacks layers that the LoRA changes.",
            file=file,
            expected=f"layers like {name_some(sorted(_adaptable(model)), 3)}",
            found=f"{len(names)} layers such as {name_some(names, 3)}",
            remedy="use the base model the LoRA was trained for; for a file in another program's names, let "
            "`legomole.hosts.diffusers.mixing.experts` (diffusers) or the MoLE Mix node (ComfyUI) find the layers",
        )
    return found


def _path(name: str, paths: set[str]) -> str | None:
    candidates = [name, *(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))]
    return next((path for path in candidates if path in paths), None)


def _adaptable(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def _left_out(mixture: Mixture) -> Iterable[str]:
    for adapter in mixture.experts:
        for name in adapter.modules:
            if is_text_encoder(name) and name not in mixture.places:
                yield f"{name} of {adapter.label}: it belongs to a text encoder"
        for kind, tensors in (("difference", adapter.diffs), ("replaced value", adapter.extras)):
            for name in tensors:
                yield f"{name} of {adapter.label}: a {kind} has no low-rank factors to gate"


def _dtype(layer: nn.Module, wanted: torch.dtype | None) -> torch.dtype | None:
    weight = getattr(layer, "weight", None)
    own: torch.dtype | None = getattr(weight, "dtype", None)
    return wanted or (own if own in _STACKABLE else None)
