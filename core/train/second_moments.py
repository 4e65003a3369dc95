"""Record second moments of the inputs of a model's layers while it runs. Works on any tree of ``torch.nn`` modules."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from ..errors import MergeError
from ..mole.forwards import first_argument

_Hook = Callable[[nn.Module, "tuple[Any, ...]", "dict[str, Any]"], None]


class InputAccumulator(Protocol):
    """Accumulates something over batches of a layer's inputs."""

    def add(self, X: Tensor) -> None:
        """Add inputs ``(..., d_in)``."""
        ...


class SecondMoments:
    """Accumulates ``C = X^T X / n`` over batches of inputs."""

    def __init__(self) -> None:
        self.n = 0
        self._sum: Tensor | None = None

    def add(self, X: Tensor) -> None:
        """Add inputs ``(..., d_in)``. Summed in float32 or wider, also inside autocast."""
        X = flat_inputs(X)
        with torch.autocast(X.device.type, enabled=False):
            product = X.mT @ X
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.n += X.shape[0]

    def merge(self, other: SecondMoments) -> None:
        """Add all inputs of another one."""
        if other._sum is not None:
            self._sum = other._sum if self._sum is None else self._sum.add_(other._sum)
            self.n += other.n

    @property
    def value(self) -> Tensor:
        """``(d_in, d_in)``.

        Raises:
            MergeError: Nothing was added.
        """
        if self._sum is None or self.n == 0:
            raise MergeError(
                "A module had no input while its statistics were measured.",
                remedy="run the model inside `record_second_moments`, with prompts that reach every module",
            )
        return self._sum / self.n


def flat_inputs(X: Tensor) -> Tensor:
    """Inputs ``(..., d_in)`` as ``(n, d_in)``, float32 or wider."""
    X = X.detach().reshape(-1, X.shape[-1])
    return X if X.dtype == torch.float64 else X.float()


@contextmanager
def record_second_moments(layers: Mapping[str, nn.Module]) -> Generator[dict[str, SecondMoments]]:
    """Record the second moments of layers' inputs while the model runs inside the ``with`` block.

    Args:
        layers: See `record_inputs`.

    Yields:
        Name -> `SecondMoments`.

    Raises:
        MergeError: See `record_inputs`.
    """
    moments = {name: SecondMoments() for name in layers}
    with record_inputs(layers, moments):
        yield moments


@contextmanager
def record_inputs(layers: Mapping[str, nn.Module], accumulators: Mapping[str, InputAccumulator]) -> Generator[None]:
    """Add the inputs of layers to accumulators while the model runs inside the ``with`` block.

    Args:
        layers: Name in the statistics -> a linear layer (or any module whose input ends in ``d_in``) or a convolution,
            whose input is unfolded to the patches that its flattened kernel sees.
        accumulators: Name -> what its inputs are added to. The hooks are always removed at the end.

    Raises:
        MergeError: A grouped convolution: its factors see only part of the channels.
    """
    for name, layer in layers.items():
        if getattr(layer, "groups", 1) != 1:
            raise MergeError("Grouped convolutions cannot be measured.", module=name)
    with _forward_pre_hooks([(layer, _adding_hook(accumulators[name])) for name, layer in layers.items()]):
        yield


@dataclass
class LayerInput:
    """The input of a layer in a forward pass.

    Args:
        d_in: Its width.
        tensors: Numbers of the tensors it was called with; equal for layers that read the same tensors.
    """

    d_in: int
    tensors: tuple[int, ...] = ()


@contextmanager
def find_shared_inputs(layers: Mapping[str, nn.Module]) -> Generator[dict[str, LayerInput]]:
    """Find out which layers read the very same tensor in a forward pass inside the ``with`` block.

    Yields:
        Name -> `LayerInput`, for layers that were called. The tensors are not kept alive.
    """
    inputs: dict[str, LayerInput] = {}
    numbers = _TensorNumbers()
    with _forward_pre_hooks([(layer, _numbering_hook(name, inputs, numbers)) for name, layer in layers.items()]):
        yield inputs


@contextmanager
def _forward_pre_hooks(hooks: Iterable[tuple[nn.Module, _Hook]]) -> Generator[None]:
    """Register hooks that run before the layers' forward methods, inside the block."""
    handles: list[Any] = []
    try:
        for layer, hook in hooks:
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _TensorNumbers:
    """Numbers tensors as they are passed. A tensor keeps its number while it lives and is not modified in place."""

    by_id: dict[int, tuple[Any, Tensor, int]] = field(default_factory=dict)  # id -> weak reference, sample, number
    count: int = 0

    def of(self, x: Tensor) -> int:
        # values are compared, because inference tensors have no version counter
        sample = x.flatten()[:: max(1, x.numel() // 256)].clone()
        entry = self.by_id.get(id(x))
        if entry is not None and entry[0]() is x and torch.equal(entry[1], sample):
            return entry[2]
        self.count += 1
        self.by_id[id(x)] = (ref(x), sample, self.count)
        return self.count


def _numbering_hook(name: str, inputs: dict[str, LayerInput], numbers: _TensorNumbers) -> _Hook:
    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        if isinstance(layer, _ConvNd):  # never shared: another kernel sees other patches of the same tensor
            numbers.count += 1
            width, number = x.shape[-1 - len(layer.kernel_size)] * math.prod(layer.kernel_size), numbers.count
        else:
            width, number = x.shape[-1], numbers.of(x)
        inputs.setdefault(name, LayerInput(width)).tensors += (number,)

    return note


def _adding_hook(accumulator: InputAccumulator) -> _Hook:
    def add(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        accumulator.add(convolution_patches(layer, x) if isinstance(layer, _ConvNd) else x)

    return add


def convolution_patches(conv: _ConvNd, x: Tensor) -> Tensor:
    """``(batch, positions..., in_channels * prod(kernel))``: each output position's input, flattened as the kernel."""
    n = len(conv.kernel_size)
    x = x if x.ndim == n + 2 else x[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode)
    for i, (size, step, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, step)[..., ::dilation]
    return x.movedim(1, 1 + n).flatten(1 + n)  # (batch, out..., channels, kernel...) flattened
