"""Small adapters for the tests of merge()."""

from __future__ import annotations

import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank


def part(rank: int, d_out: int = 6, d_in: int = 5, *, seed: int = 0, alpha: float | None = None, **kw) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, d_in, generator=g), torch.randn(d_out, rank, generator=g), alpha, **kw)


def named(label: str, modules: dict[str, LowRank], **kw) -> Adapter:
    return Adapter(modules, source=Source(path=f"loras/{label}.safetensors"), **kw)
