"""The part TIES and KnOTS share: trim every part, elect a sign for every entry, average the entries that agree."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ...errors import MergeError

Election = Literal["total", "frequency"]


def check_density(density: float) -> None:
    """Raise if `density`, the share of entries that are kept, is not in ``(0, 1]``."""
    if not 0 < density <= 1:
        raise MergeError(
            "The density is out of range.",
            expected="more than 0, at most 1 (1 keeps every entry)",
            found=density,
            remedy="0.5 keeps the larger half of the entries",
        )


def threshold(part: Tensor, density: float) -> Tensor:
    """The smallest magnitude among the ``density * numel`` largest entries, a scalar; 0 where all of them stay."""
    dropped = part.numel() - max(1, int(density * part.numel()))
    return part.abs().flatten().kthvalue(dropped + 1).values if dropped else part.new_zeros(())


def trim(part: Tensor, threshold: Tensor) -> Tensor:
    """Set all entries of a magnitude below the threshold to zero."""
    return part * (part.abs() >= threshold)


def ties(
    part: Callable[[int], Tensor], weights: Sequence[float], density: float, election: Election = "total"
) -> Tensor:
    """Merge tensors of one shape where they agree.

    ``merged = sum_i weights_i part_i [sign(part_i) = sign] / number of i with sign(part_i) = sign``, entry by entry,
    after trimming every part. The weights count in the sum only: they neither vote nor count in the number.

    Args:
        part: Function that returns part i; all have one shape. Called twice for each, to hold one at a time.
        weights: One weight per part.
        density: Share of each part's entries that survive trimming, ``(0, 1]``.
        election: ``"total"``: the sign of the parts' sum. ``"frequency"``: the sign most of them have. A draw is
            positive.

    Source: arXiv:2306.01708 section 3; the place of the weights is PEFT's (``combination_type="ties"``).
    """
    vote = torch.zeros_like(part(0))
    thresholds: list[Tensor] = []
    for i in range(len(weights)):
        tensor = part(i)
        thresholds.append(threshold(tensor, density))
        tensor = trim(tensor, thresholds[i])
        vote += tensor if election == "total" else tensor.sign()
    positive = vote >= 0
    merged, count = torch.zeros_like(vote), torch.zeros_like(vote)
    for i, weight in enumerate(weights):
        tensor = trim(part(i), thresholds[i])
        agrees = torch.where(positive, tensor > 0, tensor < 0)
        merged += weight * tensor * agrees
        count += agrees
    return merged / count.clamp_min(1)
