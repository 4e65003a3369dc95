"""What TIES and KnOTS share: trim every part, elect a sign for every entry, average those that agree."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor

from ..errors import MergeError

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


def trim(part: Tensor, density: float) -> Tensor:
    """Set all but the ``density * numel`` largest entries (by magnitude) to zero; equals at the border all stay."""
    size = part.abs()
    drop = part.numel() - max(1, int(density * part.numel()))
    if drop == 0:
        return part
    return part * (size >= size.flatten().kthvalue(drop + 1).values)


def ties(parts: Iterable[Tensor], weights: Iterable[float], density: float, election: Election = "total") -> Tensor:
    """Merge tensors of one shape where they agree.

    ``merged = sum_i weights_i part_i [sign(part_i) = sign] / number of i with sign(part_i) = sign``, entry by entry,
    after trimming every part. The weights count in the sum only: they neither vote nor enter the number.

    Args:
        parts: Tensors of one shape.
        weights: One number each.
        density: Share of each part's entries that survive the trimming, ``(0, 1]``.
        election: ``"total"``: the sign of the parts' sum. ``"frequency"``: the sign most of them have. A draw is
            positive.

    Source: arXiv:2306.01708 section 3; the place of the weights is PEFT's (``combination_type="ties"``).
    """
    trimmed = [trim(part, density) for part in parts]
    vote = torch.zeros_like(trimmed[0])
    for part in trimmed:
        vote += part if election == "total" else part.sign()
    positive = vote >= 0
    merged, count = torch.zeros_like(vote), torch.zeros_like(vote)
    for part, weight in zip(trimmed, weights, strict=True):
        agrees = torch.where(positive, part > 0, part < 0)
        merged += weight * part * agrees
        count += agrees
    return merged / count.clamp_min(1)
