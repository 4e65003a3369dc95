"""Adapters with known singular values, at known places, for the tests of findings."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.findings.finding import Finding
from legomole.core.merge.methods.concat import Concat

WIDTH = 32


def part(*values: float, first: int = 0, rank: int | None = None) -> LowRank:
    """``sum_j values[j] e_(first + j) e_(first + j)^T``, in factors in which the units are mixed."""
    r = rank or len(values)
    A, B = torch.zeros(r, WIDTH), torch.zeros(WIDTH, r)
    for j, value in enumerate(values):
        A[j, first + j], B[first + j, j] = 1.0, value
    R = torch.eye(r) + torch.ones(r, r).triu(1)  # an invertible matrix does not change B A
    return LowRank(R @ A, B @ torch.linalg.inv(R))


def adapter(label: str, *parts: LowRank, **named: LowRank) -> Adapter:
    """A LoRA with a layer per block: ``blocks.0.attn.q``, ``blocks.1.attn.q`` ..; and layers with names."""
    modules = {f"blocks.{i}.attn.q": each for i, each in enumerate(parts)}
    return Adapter(modules | named, source=Source(f"loras/{label}.safetensors"))


def found(kind: str, adapters: Sequence[Adapter], weights: Sequence[float] | None = None) -> list[Finding]:
    """The findings of a kind, in the report of the exact sum."""
    findings = merge(adapters, Concat(), weights, dtype=torch.float32).report.findings
    return [finding for finding in findings if finding.kind == kind]
