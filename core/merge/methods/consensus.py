"""What TIES and KnOTS share: trim every part, elect a sign for every entry, average those that agree."""

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


def border(part: Tensor, density: float) -> Tensor:
    """The smallest magnitude among the ``density * numel`` largest entries, a scalar; 0 where all of them stay."""
    drop = part.numel() - max(1, int(density * part.numel()))
    return part.abs().flatten().kthvalue(drop + 1).values if drop else part.new_zeros(())


def trim(part: Tensor, border: Tensor) -> Tensor:
    """Set all entries of a magnitude below the border to zero."""
    return part * (part.abs() >= border)


def ties(
    part: Callable[[int], Tensor], weights: Sequence[float], density: float, election: Election = "total"
) -> Tensor:
    """Merge tensors of one shape where they agree.

    ``merged = sum_i weights_i part_i [sign(part_i) = sign] / number of i with sign(part_i) = sign``, entry by entry,
    after trimming every part. The weights count in the sum only: they neither vote nor enter the number.

    Args:
        part: Makes part i, all of one shape; called twice for each, because all at once may be too much to hold.
        weights: One number for each part.
        density: Share of each part's entries that survive the trimming, ``(0, 1]``.
        election: ``"total"``: the sign of the parts' sum. ``"frequency"``: the sign most of them have. A draw is
            positive.

    Source: arXiv:2306.01708 section 3; the place of the weights is PEFT's (``combination_type="ties"``).
    """
    vote = torch.zeros_like(part(0))
    borders: list[Tensor] = []
    for i in range(len(weights)):
        own = part(i)
        borders.append(border(own, density))
        own = trim(own, borders[i])
        vote += own if election == "total" else own.sign()
    positive = vote >= 0
    merged, count = torch.zeros_like(vote), torch.zeros_like(vote)
    for i, weight in enumerate(weights):
        own = trim(part(i), borders[i])
        agrees = torch.where(positive, own > 0, own < 0)
        merged += weight * own * agrees
        count += agrees
    return merged / count.clamp_min(1)
