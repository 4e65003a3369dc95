"""Remedies for findings: limit singular values (cap), and bring the loudness of LoRAs together (equalize)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..adapter import Adapter
from ..errors import MergeError, name_some
from ..lowrank import LowRank
from .gram import GramSVD
from .pool import Pool


@dataclass(frozen=True)
class CappedLayer:
    """A layer whose singular values were lowered.

    Args:
        name: Layer name. adapter: Position of the adapter.
        energy: Its ``|delta|_F^2`` before, without the user's weight. removed: How much of that was removed.
    """

    name: str
    adapter: int
    energy: float
    removed: float


def check_remedies(cap: float | None, equalize: float) -> None:
    """Raise MergeError unless `cap` is at least 1, and `equalize` in the range 0 .. 1."""
    if cap is not None and not (math.isfinite(cap) and cap >= 1):
        raise MergeError("The cap is too low.", expected="a number of 1 or more, e.g. 8", found=cap)
    if not 0 <= equalize <= 1:
        raise MergeError("The share for equalize is out of range.", expected="0 to 1", found=equalize)


def cap_limits(S: Tensor, cap: float) -> Tensor:
    """Largest singular value that `cap` allows: `cap` times the lower median of those that are not 0.

    Values above it are lowered further, to the largest value within it: a layer whose other values lie close together
    never had one at the limit.

    The lower median of 4 values is the third one. In a layer of rank 1 it is the only one, which stays.

    Args:
        S: Singular values, descending, ``(M, r)``. cap: At least 1.

    Returns:
        ``(M,)``; 0 for a layer of zeros.
    """
    nonzero = (S > 0).sum(1)
    return cap * S.gather(1, (nonzero // 2)[:, None].clamp_max(S.shape[1] - 1))[:, 0]


def cap_parts(
    pool: Pool, parts: Sequence[Sequence[LowRank]], cap: float
) -> tuple[list[list[LowRank]], list[CappedLayer]]:
    """Lower the singular values of every adapter in every layer that exceed its limit, see `cap_limits`.

    Args:
        pool: The units of a batch. parts: Its updates, per layer and adapter. cap: At least 1.

    Returns:
        The updates, of which those within the limit are unchanged; and the layers that were changed.
    """
    capped, changed = [list(row) for row in parts], list[CappedLayer]()
    for i, svd in enumerate(pool.adapter_svds):
        limits = cap_limits(svd.S, cap)
        # the slack is that of factors which are stored in float16, so that a capped file is not capped again
        for m in (svd.S[:, 0] > limits * 1.002).nonzero()[:, 0].tolist():
            capped[m][i], removed = _capped(parts[m][i], svd, m, limits[m])
            energy = float(svd.S[m].square().sum())
            changed.append(CappedLayer(pool.names[m], pool.adapters[i], energy, removed))
    return capped, changed


def _capped(part: LowRank, svd: GramSVD, m: int, limit: Tensor) -> tuple[LowRank, float]:
    """The update of a layer without singular values above `limit`, and the energy that it loses."""
    S = svd.S[m]
    allowed = S[limit * 1.002 >= S].max()  # the median at least
    root = torch.where(allowed < S, allowed / torch.where(S > 0, S, 1), 1).sqrt()
    A = (root[:, None] * svd.R_A[m]).cpu() @ part.A.double()
    B = part.B.double() @ (svd.R_B[m] * root).cpu()
    removed = float((S.square() - S.clamp_max(allowed).square()).sum())
    return replace(part, A=A.to(part.dtype), B=B.to(part.dtype), alpha=None), removed


def cap_notes(adapters: Sequence[Adapter], cap: float, changed: Sequence[CappedLayer]) -> Iterator[str]:
    """A sentence per adapter on its layers that were capped, for reports."""
    for i, adapter in enumerate(adapters):
        layers = sorted((layer for layer in changed if layer.adapter == i), key=lambda layer: layer.name)
        if layers:
            share = sum(layer.removed for layer in layers) / sum(layer.energy for layer in layers)
            yield (
                f"cap {cap:g} lowered singular values in {len(layers)} layers of {adapter.label}, which removes "
                f"{share:.1%} of their energy: {name_some(layer.name for layer in layers)}"
            )


def equalizing_factors(loudness: Sequence[float], share: float) -> list[float]:
    """Factors on the weights that bring LoRAs together: ``(mean / loudness_i)^share``, mean being the geometric mean.

    At 1 all LoRAs are as loud as the mean, at 0.5 a LoRA that is 4 times as loud as it becomes 2 times as loud. The
    geometric mean of all stays the same. A LoRA without any energy keeps its weight.

    Args:
        loudness: Norms of the LoRAs' deltas over all layers. share: 0 .. 1.
    """
    logs = [math.log(value) for value in loudness if value > 0]
    mean = sum(logs) / len(logs) if logs else 0.0
    return [math.exp(share * (mean - math.log(value))) if value > 0 else 1.0 for value in loudness]
