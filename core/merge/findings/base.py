"""Findings that need the base model's weights: LoRAs larger than the weights they change, and intruder directions."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from ...adapter import Adapter
from ...errors import name_some
from ...formats import BaseWeights
from ...lowrank import best_rank_k
from .finding import Finding, largest_first

LARGER = 1.0
"""Frobenius norm of a delta relative to the weight it is added to: more replaces the weight."""
INTRUDER, TOP = 0.5, 10
"""Largest cosine with the base's singular vectors up to which one of the ten first of the changed weight is an
intruder: the defaults of PEFT's `reduce_intruder_dimension`."""
_MEASURED = 12  # layers per LoRA that are measured for intruders: those it changes most, as an SVD takes seconds each


def findings_with_base(
    adapters: Sequence[Adapter], weights: Sequence[Mapping[str, float]], base: BaseWeights
) -> Iterator[Finding]:
    """Compare each adapter, at its weights, with the base model.

    Args:
        adapters: The adapters, with layers named as in the base model or by one of the dialects that `BaseWeights`
            knows.
        weights: Per adapter, the weight of each module.
        base: The base model.

    Raises:
        FormatError: The base model has no weight for a layer.
    """
    for adapter, weight in zip(adapters, weights, strict=True):
        modules = {name: part for name, part in adapter.modules.items() if weight[name]}
        ratios: dict[str, float] = {}
        for name, part in modules.items():
            norm = float(base.weight(name, part.d_out, part.d_in).norm())
            size = abs(weight[name]) * part.energy() ** 0.5
            ratios[name] = size / norm if norm > 0 else float("inf") if size > 0 else 0.0
        yield from _larger_than_weights(adapter.label, ratios)
        cosines: dict[str, float] = {}
        for name in sorted(ratios, key=lambda name: -ratios[name])[:_MEASURED]:
            part = modules[name]
            W = base.weight(name, part.d_out, part.d_in)
            cosines[name] = lowest_cosine(W, weight[name] * part.scale * part.B.double() @ part.A.double())
        yield from _intruders(adapter.label, cosines)


def lowest_cosine(W: Tensor, delta: Tensor) -> float:
    """How well the base's left singular vectors explain the first ones of ``W + delta``.

    Args:
        W: ``(d_out, d_in)`` float64. delta: Likewise.

    Returns:
        The smallest, over the first `TOP` left singular vectors of ``W + delta``, of the largest ``|cosine|`` with any
        left singular vector of `W`.

    Source: PEFT's `reduce_intruder_dimension`; arXiv:2410.21228.
    """
    k = min(TOP, *W.shape)
    U = torch.linalg.svd(W, full_matrices=False).U
    top = torch.nn.functional.normalize(best_rank_k(W + delta, k)[1], dim=0)
    return float((top.mT @ U).abs().amax(1).min())


def _larger_than_weights(label: str, ratios: Mapping[str, float]) -> Iterator[Finding]:
    larger = largest_first(ratios, LARGER)
    if larger:
        value = ratios[larger[0]]
        yield Finding(
            "larger_than_weights", (label,), tuple(larger), value, LARGER,
            f"{label} is up to {value:.3g} times as large as the weights it changes, in {name_some(larger)} "
            f"({LARGER:g} or more replaces them)",
            "lower its weight, or merge with cap 8 if it has a spike there",
        )  # fmt: skip


def _intruders(label: str, cosines: Mapping[str, float]) -> Iterator[Finding]:
    found = sorted((name for name, cosine in cosines.items() if cosine < INTRUDER), key=lambda name: cosines[name])
    if found:
        value = cosines[found[0]]
        yield Finding(
            "intruder", (label,), tuple(found), value, INTRUDER,
            f"{label} has intruder directions in {len(found)} of the {len(cosines)} layers it changes most: one of the "
            f"{TOP} first directions there has a cosine of at most {value:.2f} with any of the base model's (below "
            f"{INTRUDER:g} is an intruder)",
            "lower its weight; with PEFT, reduce_intruder_dimension weakens these directions",
        )  # fmt: skip
