"""Freeze models that are used, but not changed, while gates are trained."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

from torch import nn


@contextmanager
def frozen(parts: Iterable[Any]) -> Generator[None]:
    """Inside the block the modules among `parts` get no gradients. Their modes and dtypes are restored afterwards."""
    modules = [part for part in parts if isinstance(part, nn.Module)]
    gradients = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    modes = [(part, part.training) for module in modules for part in module.modules()]
    dtypes = [(module, next(module.parameters()).dtype) for module in modules]
    for module in modules:
        module.requires_grad_(False).eval()
    try:
        yield
    finally:
        for parameter, before in gradients:
            parameter.requires_grad_(before)
        for part, before in modes:
            part.training = before
        for module, before in dtypes:
            if next(module.parameters()).dtype != before:  # a VAE that had to compute in float32
                module.to(before)
