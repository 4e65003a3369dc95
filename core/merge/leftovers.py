"""The parts of adapters that are not low rank: diffs are summed, other tensors are carried into the result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..adapter import Adapter, check_finite
from ..errors import MergeError
from .tasks import overflow_error
from .weights import Weights


@dataclass(frozen=True, eq=False)
class Leftovers:
    """The parts of a merge's result that are not low rank.

    Args:
        diffs: Sums of the adapters' diffs with the weights of their layers.
        extras: Tensors that were carried unchanged.
        passed_on: Keys of both, with their adapters, for the report.
        dropped: Keys that could not be kept, with the reason, for the report.
    """

    diffs: dict[str, Tensor]
    extras: dict[str, Tensor]
    passed_on: tuple[str, ...]
    dropped: tuple[str, ...]


def merge_leftovers(adapters: Sequence[Adapter], weights: Weights, dtype: torch.dtype) -> Leftovers:
    """Sum the diffs in `dtype`, and carry the extras of the adapters that take part; the first of several is kept.

    Raises:
        MergeError: Diffs of different shape under one name, or a sum that overflows `dtype`.
        FormatError: NaN or infinity in a diff.
    """
    diffs: dict[str, Tensor] = {}
    extras: dict[str, Tensor] = {}
    owners: dict[str, str] = {}
    passed_on: list[str] = []
    dropped: list[str] = []
    for i, adapter in enumerate(adapters):
        for name, tensor in adapter.diffs.items():
            weight = weights.modules[i][name.rpartition(".")[0]]
            if weight == 0:
                continue
            check_finite(tensor, name, adapter.source.path)
            diff = weight * tensor.float()
            if name in diffs and diffs[name].shape != diff.shape:
                raise MergeError(
                    "The LoRAs do not fit the same base model: one parameter has different shapes.",
                    module=name,
                    found=f"{tuple(diffs[name].shape)} and {tuple(diff.shape)} in {adapter.label}",
                )
            diffs[name] = diffs[name] + diff if name in diffs else diff
            passed_on.append(f"{name} (added, times {weight:g}, from {adapter.label})")
        for name, tensor in adapter.extras.items() if weights.used[i] else ():
            if name not in extras:
                extras[name] = tensor
                owners[name] = adapter.label
                passed_on.append(f"{name} (unchanged, from {adapter.label})")
            elif extras[name].shape != tensor.shape or not torch.equal(extras[name], tensor):
                dropped.append(f"{name} of {adapter.label}: it cannot be added, and {owners[name]} has another one")
    diffs = {name: _converted(name, diff, dtype) for name, diff in diffs.items()}
    return Leftovers(diffs, extras, tuple(passed_on), tuple(dropped))


def _converted(name: str, diff: Tensor, dtype: torch.dtype) -> Tensor:
    result = diff.to(dtype)
    if not torch.isfinite(result).all():
        raise overflow_error(name, dtype, float(diff.abs().max()))
    return result
