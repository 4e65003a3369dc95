"""What the comparisons share: a LoRA in a model's weights, and files that are written whole."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from torch import Tensor


@contextmanager
def merged_in(model: Any, adapter: Adapter, strength: float, prefix: str = "") -> Generator[Any]:
    """The model with an adapter in its weights; afterwards as it was, bit for bit.

    Args:
        prefix: What the adapter's names of layers have before the model's own.
    """
    before: dict[Tensor, Tensor] = {}
    with torch.no_grad():
        for name, part in adapter.modules.items():
            weight = model.get_submodule(name.removeprefix(prefix)).weight
            before[weight] = weight.clone()
            weight += strength * part.delta().float()
    try:
        yield model
    finally:
        with torch.no_grad():
            for weight, kept in before.items():
                weight.copy_(kept)


def write(path: Path, value: Any) -> None:
    """As JSON, or as the text it is; whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text((value if isinstance(value, str) else json.dumps(value, indent=1)) + "\n")
    part.replace(path)
