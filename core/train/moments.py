"""Measure the inputs of a model's modules while it runs. Knows no host: any tree of ``torch.nn`` modules will do."""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from ..errors import MergeError
from ..mole.forwards import first_argument


class SecondMoments:
    """Accumulates ``C = X^T X / n`` over batches of inputs."""

    def __init__(self) -> None:
        self.n = 0
        self._sum: Tensor | None = None

    def add(self, X: Tensor) -> None:
        """Count inputs ``(..., d_in)`` in. Summed in float32 at least, also inside autocast."""
        X = X.detach().reshape(-1, X.shape[-1])
        X = X if X.dtype == torch.float64 else X.float()
        with torch.autocast(X.device.type, enabled=False):
            product = X.mT @ X
        self._sum = product if self._sum is None else self._sum.add_(product)
        self.n += X.shape[0]

    def merge(self, other: SecondMoments) -> None:
        """Count in what another one has counted."""
        if other._sum is not None:
            self._sum = other._sum if self._sum is None else self._sum.add_(other._sum)
            self.n += other.n

    @property
    def value(self) -> Tensor:
        """``(d_in, d_in)``.

        Raises:
            MergeError: Nothing was counted.
        """
        if self._sum is None or self.n == 0:
            raise MergeError(
                "A module saw no input while its statistics were measured.",
                remedy="run the model inside `gather`, with prompts that reach every module",
            )
        return self._sum / self.n


@contextmanager
def gather(modules: Mapping[str, nn.Module]) -> Generator[dict[str, SecondMoments]]:
    """Measure the inputs of modules while the model runs inside the ``with`` block.

    Args:
        modules: Name in the statistics -> a linear layer (anything whose input ends in ``d_in``) or a convolution,
            whose input is unfolded to the patches that its flattened kernel sees.

    Yields:
        Name -> `SecondMoments`. The hooks are removed at the end, whatever happens.

    Raises:
        MergeError: A grouped convolution: its factors see only part of the channels.
    """
    for name, module in modules.items():
        if getattr(module, "groups", 1) != 1:
            raise MergeError("Grouped convolutions cannot be measured.", module=name)
    moments = {name: SecondMoments() for name in modules}
    with _hooked([(module, _hook(moments[name])) for name, module in modules.items()]):
        yield moments


@contextmanager
def _hooked(hooks: Iterable[tuple[nn.Module, Any]]) -> Generator[None]:
    """Call a hook of its own before each module's forward, inside the block."""
    handles: list[Any] = []
    try:
        for module, hook in hooks:
            handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class Seen:
    """What a module's input was in a pass of the model.

    Args:
        d_in: Its width. tensors: Numbers of the tensors it was called with; the same for modules that read the same.
    """

    d_in: int
    tensors: tuple[int, ...] = ()


@contextmanager
def observe(modules: Mapping[str, nn.Module]) -> Generator[dict[str, Seen]]:
    """See, in a pass of the model inside the ``with`` block, which modules read the very same input.

    Yields:
        Name -> `Seen`, for modules that were called. The tensors are not kept alive.
    """
    seen: dict[str, Seen] = {}
    numbers = _Numbers()
    with _hooked([(module, _noting(name, seen, numbers)) for name, module in modules.items()]):
        yield seen


@dataclass
class _Numbers:
    """Numbers tensors as they come. The same tensor has its number as long as it lives and is not written to."""

    known: dict[int, tuple[Any, Tensor, int]] = field(default_factory=dict)  # id -> reference, some of it, number
    count: int = 0

    def of(self, x: Tensor) -> int:
        some = x.flatten()[:: max(1, x.numel() // 256)].clone()  # tensors for inference do not count their versions
        found = self.known.get(id(x))
        if found is not None and found[0]() is x and torch.equal(found[1], some):
            return found[2]
        self.count += 1
        self.known[id(x)] = (ref(x), some, self.count)
        return self.count


def _noting(name: str, seen: dict[str, Seen], numbers: _Numbers) -> Any:
    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        if isinstance(module, nn.modules.conv._ConvNd):  # another kernel sees other patches of the same tensor
            numbers.count += 1
            width, number = x.shape[-1 - len(module.kernel_size)] * math.prod(module.kernel_size), numbers.count
        else:
            width, number = x.shape[-1], numbers.of(x)
        found = seen.setdefault(name, Seen(width))
        found.tensors += (number,)

    return note


def _hook(moment: SecondMoments) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = first_argument(args, kwargs)
        moment.add(_patches(module, x) if isinstance(module, nn.modules.conv._ConvNd) else x)

    return count


def _patches(conv: nn.modules.conv._ConvNd, x: Tensor) -> Tensor:
    """``(batch, positions..., in_channels * prod(kernel))``: each output position's input, flattened as the kernel."""
    n = len(conv.kernel_size)
    x = x if x.ndim == n + 2 else x[None]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    x = nn.functional.pad(x, conv._reversed_padding_repeated_twice, mode)
    for i, (size, step, dilation) in enumerate(zip(conv.kernel_size, conv.stride, conv.dilation, strict=True)):
        x = x.unfold(2 + i, dilation * (size - 1) + 1, step)[..., ::dilation]
    return x.movedim(1, 1 + n).flatten(1 + n)  # (batch, out..., channels, kernel...) flattened
