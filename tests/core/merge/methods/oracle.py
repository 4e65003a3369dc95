"""PEFT's ``add_weighted_adapter`` on one linear layer, as an oracle."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from legomole.core.merge.pool import Pool
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn


def peft_delta(pool: Pool, combination: str, **options: Any) -> Tensor:
    """``(M, d_out, d_in)`` float64: what PEFT makes of the pool's adapters with their weights and scales."""
    return torch.stack([_module(pool, m, combination, options) for m in range(pool.batch)]).double()


def _module(pool: Pool, m: int, combination: str, options: dict[str, Any]) -> Tensor:
    base = nn.Sequential()
    base.add_module("layer", nn.Linear(pool.A.shape[2], pool.B.shape[1], bias=False))
    names = [f"lora{i}" for i in range(len(pool.ranks))]
    configs = [
        LoraConfig(r=r, lora_alpha=r * scale, target_modules=["layer"])
        for r, scale in zip(pool.ranks, _first(pool, pool.scale[m]), strict=True)
    ]
    model = get_peft_model(base, configs[0], adapter_name=names[0])
    for name, config in zip(names[1:], configs[1:], strict=True):
        model.add_adapter(name, config)
    layer = model.base_model.model.layer
    with torch.no_grad():
        for name, A, B in zip(names, pool.split(pool.A[m], 0), pool.split(pool.B[m], 1), strict=True):
            layer.lora_A[name].weight.copy_(A)
            layer.lora_B[name].weight.copy_(B)
    model.add_weighted_adapter(names, pool.weights[m].tolist(), "merged", combination_type=combination, **options)
    return layer.get_delta_weight("merged").detach()


def _first(pool: Pool, values: Tensor) -> Sequence[float]:
    """One value per adapter of a tensor that has one per unit."""
    return [float(part[0]) for part in pool.split(values, 0)]
