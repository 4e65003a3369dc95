"""A backend that multiplies float32 matrices in bfloat16, as some processors do where a program allows it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

_PRODUCTS = ("mm", "bmm", "addmm", "baddbmm", "mv", "addmv", "dot")


def allowed() -> bool:
    """Whether the process has allowed products of less than float32 precision."""
    return torch.get_float32_matmul_precision() != "highest"


class RoundedProducts(TorchDispatchMode):
    """Round the float32 operands of all matmuls of this thread to bfloat16.

    Args:
        when: Asked at every product; default: where the process allows it.
    """

    def __init__(self, when: Callable[[], bool] = allowed) -> None:
        super().__init__()
        self.when = when
        self.rounded = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.name().removeprefix("aten::").partition(".")[0] in _PRODUCTS and self.when():
            args = tree_map(self._round, args)
        return func(*args, **(kwargs or {}))

    def _round(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or x.dtype != torch.float32:
            return x
        self.rounded += 1
        return x.bfloat16().float()
