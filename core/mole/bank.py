"""Bank: what a mixture needs to run on one model, as a module that can be moved and cast like any other."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from ..adapter import is_text_encoder
from ..errors import MergeError, name_some
from .adapted_layers import LayerSlice, rows_of, stacks
from .gates import GateSet
from .mixture import Mixture, Regions
from .scopes import Scope, scopes, uncompiled

# Prefixes that files put before the path of a layer in its own model.
_PREFIXES = ("diffusion_model.", "transformer.", "unet.", "base_model.model.")
_STACK_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class Bank(nn.Module):
    """The stacked experts of every adapted layer, and the gates.

    Args:
        model: The module tree the experts were made for; it is only inspected.
        mixture: Its gates are copied: training changes the bank's gates, never the mixture's.
        dtype: Dtype of the stacked factors; default that of each layer's weight if it is an ordinary float dtype.

    Attributes:
        paths: Module name of an expert -> path of the layer it changes.
        stacks: Path of a layer -> its `Stack`. scopes: Path of a layer -> its scope.
        gates: The gates in use.
        regions, steps, labels, is_partial: See `Mixture`.
        left_out: Parts of the experts that cannot be mixed at run time, each with the reason.

    Raises:
        MergeError: Experts for another model.
    """

    def __init__(self, model: nn.Module, mixture: Mixture, *, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        model = uncompiled(model)
        targets = _find_targets(model, mixture)
        changed = {target.path for target in targets.values()}
        layers = {path: layer for path, layer in model.named_modules() if path in changed}  # in the model's order
        self.paths = {name: target.path for name, target in targets.items()}
        self.stacks = stacks(mixture, layers, targets)
        self.scopes: dict[str, Scope] = scopes(model, self.stacks, mixture.gates.settings.granularity)
        self.gates = self._copy_used_gates(mixture.gates)
        self.mixing, self.experts = mixture.mixing, len(mixture.experts)
        self.regions: Regions = mixture.regions
        self.steps, self.labels = mixture.steps, mixture.labels
        self.is_partial = mixture.is_partial
        self.left_out = tuple(_left_out(mixture))
        for path, stack in self.stacks.items():
            stack.to(dtype=_stack_dtype(layers[path], dtype))
            self.add_module(path.replace(".", "/"), stack)  # a module's name must not have dots

    def _copy_used_gates(self, gates: GateSet) -> GateSet:
        """A copy of the gates of the scopes here: scopes that only a switched-off expert changes are missing."""
        scope_names = {scope.name for scope in self.scopes.values()}
        used = {name: gates[name] for name in gates.names if name in scope_names}
        if gates.trained and not used:
            raise MergeError(
                "The gates were trained for other parts of a model than these LoRAs change here.",
                expected=f"parts like {name_some(sorted(name or '(network)' for name in scope_names), 3)}",
                found=f"{len(gates.names)} gates such as {name_some([name or '(network)' for name in gates.names], 3)}",
                remedy="use the gates with the base model they were trained on, in the same host",
            )
        return GateSet(gates.experts, gates.settings, used, gates.detector).copy()

    @property
    def blocks(self) -> dict[str, list[str]]:
        """Path of a block -> the names of the scopes inside it."""
        names: dict[str, list[str]] = {}
        for scope in self.scopes.values():
            if scope.block:
                inside = names.setdefault(scope.block, [])
                if scope.name and scope.name not in inside:
                    inside.append(scope.name)
        return names

    @property
    def parameters_of_gates(self) -> list[nn.Parameter]:
        """The parameters that training changes."""
        return [p for p in self.gates.parameters() if p.requires_grad]


def _find_targets(model: nn.Module, mixture: Mixture) -> dict[str, LayerSlice]:
    """The rows of a layer that every module of the experts changes."""
    paths = {name for name, _ in model.named_modules()}
    targets: dict[str, LayerSlice] = {}
    missing: dict[str, list[str]] = {}
    for adapter in mixture.experts:
        for name, update in adapter.modules.items():
            target = mixture.targets.get(name)
            if target is not None:
                targets[name] = LayerSlice(target.key, target.start, target.stop, target.order)
                continue
            path = _path_of(name, paths)
            if path is not None:
                targets[name] = LayerSlice(path, 0, rows_of(model.get_submodule(path)) or update.d_out)
            elif not is_text_encoder(name):
                missing.setdefault(adapter.source.path or adapter.label, []).append(name)
    wrong = [target.path for target in targets.values() if target.path not in paths]
    if missing or wrong or not targets:
        file, names = next(iter(missing.items()), (None, wrong or ["(text encoder layers only)"]))
        raise MergeError(
            "No layer of the LoRA is in this model."
            if not targets
            else "The model lacks layers that the LoRA changes.",
            file=file,
            expected=f"layers like {name_some(sorted(_adaptable_layers(model)), 3)}",
            found=f"{len(names)} layers such as {name_some(names, 3)}",
            remedy="use the base model the LoRA was trained for; for a file with other layer names, let "
            "`legomole.experts` (diffusers, transformers) or the MoLE Mix node (ComfyUI) find the layers",
        )
    return targets


def _path_of(name: str, paths: set[str]) -> str | None:
    candidates = [name, *(name.removeprefix(prefix) for prefix in _PREFIXES if name.startswith(prefix))]
    return next((path for path in candidates if path in paths), None)


def _adaptable_layers(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, (nn.Linear, nn.Conv2d))]


def _left_out(mixture: Mixture) -> Iterable[str]:
    for adapter in mixture.experts:
        for name in adapter.modules:
            if is_text_encoder(name) and name not in mixture.targets:
                yield f"{name} of {adapter.label}: it belongs to a text encoder"
        for kind, tensors in (("difference", adapter.diffs), ("replaced value", adapter.extras)):
            for name in tensors:
                yield f"{name} of {adapter.label}: a {kind} has no low-rank factors to gate"


def _stack_dtype(layer: nn.Module, requested: torch.dtype | None) -> torch.dtype | None:
    weight = getattr(layer, "weight", None)
    layer_dtype: torch.dtype | None = getattr(weight, "dtype", None)
    return requested or (layer_dtype if layer_dtype in _STACK_DTYPES else None)
