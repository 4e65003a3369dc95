"""Measure the inputs of a model's modules while it runs. Knows no host: any tree of ``torch.nn`` modules will do."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import MergeError


class Moment:
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

    def merge(self, other: Moment) -> None:
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
def gather(modules: Mapping[str, nn.Module]) -> Generator[dict[str, Moment]]:
    """Measure the inputs of modules while the model runs inside the ``with`` block.

    Args:
        modules: Name in the statistics -> a linear layer (anything whose input ends in ``d_in``) or a convolution,
            whose input is unfolded to the patches that its flattened kernel sees.

    Yields:
        Name -> `Moment`. The hooks are removed at the end, whatever happens.

    Raises:
        MergeError: A grouped convolution: its factors see only part of the channels.
    """
    moments = {name: Moment() for name in modules}
    handles = []
    try:
        for name, module in modules.items():
            if getattr(module, "groups", 1) != 1:
                raise MergeError("Grouped convolutions cannot be measured.", module=name)
            handles.append(module.register_forward_pre_hook(_hook(moments[name])))
        yield moments
    finally:
        for handle in handles:
            handle.remove()


def _hook(moment: Moment) -> Any:
    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        moment.add(_patches(module, args[0]) if isinstance(module, nn.modules.conv._ConvNd) else args[0])

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
