"""Layers that a mixture changes: checks that each update fits its layer, and stacks the experts of each layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from ..errors import MergeError
from ..layers.keymap import Spans
from ..lowrank import LowRank
from .mixture import Mixture
from .stack import ExpertSlice, Stack


class LayerSlice(NamedTuple):
    """Output rows of a layer in a model.

    Args:
        path: Path of the layer.
        start, stop: First row, and the row after the last.
        order: Row permutation, see `core.layers.keymap.ParameterSlice`.
    """

    path: str
    start: int
    stop: int
    order: Spans | None = None


def stacks(mixture: Mixture, layers: Mapping[str, nn.Module], targets: Mapping[str, LayerSlice]) -> dict[str, Stack]:
    """The stack of every adapted layer.

    Args:
        mixture: The experts; its scale and strengths are multiplied into the factors.
        layers: Path -> layer; the stacks come in this order.
        targets: Module name of an expert -> rows of a layer.

    Raises:
        MergeError: An update that does not fit its layer, or a kind of layer that cannot be mixed.
    """
    parts: dict[str, list[ExpertSlice]] = {}
    for i, (adapter, strength) in enumerate(zip(mixture.experts, mixture.strengths, strict=True)):
        for name, update in adapter.modules.items():
            if name in targets:
                path, start, stop, order = targets[name]
                _check_fits(layers[path], update, start, stop, f"{path} ({adapter.label})")
                parts.setdefault(path, []).append(ExpertSlice(i, update, start, stop, strength * mixture.scale, order))
    stack_of: dict[str, Stack] = {}
    for path, layer in layers.items():
        if path not in parts:
            continue
        kernel = tuple(layer.kernel_size) if isinstance(layer, _ConvNd) else ()
        stack_of[path] = Stack(parts[path], rows_of(layer) or max(part.stop for part in parts[path]), kernel)
    return stack_of


def rows_of(layer: nn.Module) -> int | None:
    """Number of output rows of a linear layer or convolution; ``None`` if the layer has no attribute for it."""
    for name in ("out_features", "out_channels", "nf"):  # nf: GPT-2's transposed linear layer
        if isinstance(rows := getattr(layer, name, None), int):
            return rows
    return None


def _check_fits(layer: nn.Module, update: LowRank, start: int, stop: int, module: str) -> None:
    if isinstance(layer, (nn.Embedding, NonDynamicallyQuantizableLinear)):
        raise MergeError(
            "A layer whose weight is used without calling the layer cannot be mixed at run time.",
            module=module,
            found=type(layer).__name__,
            remedy="merge these LoRAs instead, or leave this layer out of them",
        )
    rows, width = rows_of(layer), getattr(layer, "in_features", getattr(layer, "nx", None))
    if isinstance(layer, _ConvNd):
        width = layer.in_channels * math.prod(layer.kernel_size)
        if layer.groups != 1 or layer.transposed:
            raise MergeError(
                "A grouped or transposed convolution cannot be mixed.",
                module=module,
                remedy="merge these LoRAs instead, or give this layer a weight of 0",
            )
    fits = update.d_out == stop - start and (rows is None or stop <= rows) and width in (None, update.d_in)
    if not fits:
        raise MergeError(
            "The LoRA was made for another base model: one of its layers has a different shape.",
            module=module,
            expected=f"(d_out, d_in) = {(stop - start, width)}",
            found=(update.d_out, update.d_in),
            remedy="use the base model the LoRA was trained for",
        )
