"""Scopes: the parts of a model that one gate rules each, found from the module tree of any architecture.

A block is the innermost numbered module around a layer that has a forward method of its own and more than one child
with weights (a Flux double block, a U-Net's transformer block or resnet, a language model's layer).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from .gates import Granularity

NETWORK = ""  # the scope of layers outside of all blocks, and of all layers at granularity "network"


@dataclass(frozen=True)
class Scope:
    """The scope of a layer.

    Args:
        name: Path of the module that one gate rules; `NETWORK` for the rest of the model.
        block: Path of the block around the layer, ``""`` outside of all blocks.
    """

    name: str
    block: str


def scopes(model: nn.Module, layers: Iterable[str], granularity: Granularity) -> dict[str, Scope]:
    """The scope of each layer.

    Args:
        model: Any module tree. layers: Paths in it.
        granularity: See `GateSettings`. Outside of blocks all granularities but ``matrix`` use the network scope.
    """
    scope_of: dict[str, Scope] = {}
    for path in layers:
        block = _block(model, path)
        if granularity == "matrix":
            name = path
        elif granularity == "network" or not block:
            name = NETWORK
        else:
            name = block if granularity == "block" else _attention_or_feed_forward(model, path, block)
        scope_of[path] = Scope(name, block)
    return scope_of


def uncompiled(model: nn.Module) -> nn.Module:
    """The module itself, if ``torch.compile`` has wrapped it: the wrapper has other layer names."""
    inner = getattr(model, "_orig_mod", model)
    return inner if isinstance(inner, nn.Module) else model


def _block(model: nn.Module, path: str) -> str:
    parts = path.split(".")
    for n in range(len(parts) - 1, 0, -1):
        if parts[n - 1].isdigit():
            module = model.get_submodule(".".join(parts[:n]))
            if not _is_container(module) and sum(_has_weights(child) for child in module.children()) > 1:
                return ".".join(parts[:n])
    return ""


def _attention_or_feed_forward(model: nn.Module, path: str, block: str) -> str:
    """The module inside a block that a layer belongs to: the path between them, up to the first container below.

    ``attn1.to_out.0`` belongs to ``attn1``, ``ff.net.0.proj`` to ``ff``, ``x_block.attn.qkv`` to ``x_block.attn``.
    """
    between = path[len(block) + 1 :].split(".")[:-1]
    for n in range(1, len(between)):
        if _is_container(model.get_submodule(".".join([block, *between[: n + 1]]))):
            between = between[:n]
            break
    return ".".join([block, *between])


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict))


def _has_weights(module: nn.Module) -> bool:
    return next(module.parameters(), None) is not None
