"""Add the factors themselves: PEFT's ``linear``. Kept for comparison; it is not the sum of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..merged import LinearCombination, Merged
from ..pool import Pool


@dataclass(frozen=True)
class Linear:
    """``A = sum_i sqrt|w_i s_i| A_i``, ``B = sum_i sign(w_i) sqrt|w_i s_i| B_i``: unit j is added to unit j.

    The product has cross terms ``B_i A_j``, so the result depends on how each trainer happened to order and scale its
    units. Lower ranks are padded with zero units. Unlike in PEFT, the sign of a negative weight goes to `B` alone, so
    that an adapter at weight -1 is subtracted.

    Source: PEFT's ``add_weighted_adapter(combination_type="linear")``.
    """

    def __call__(self, pool: Pool) -> Merged:
        k = max(pool.ranks)
        place = torch.cat([torch.arange(r, device=pool.c.device) for r in pool.ranks])
        pick = torch.nn.functional.one_hot(place, k).to(pool.c)  # (P, k): unit j of every adapter goes into unit j
        root = pool.c.abs().sqrt()  # sqrt|w_i s_i|
        R_A, R_B = pick.T * root[:, None, :], (root * pool.c.sign())[:, :, None] * pick
        return LinearCombination(R_A, R_B, torch.full((pool.batch,), k)).apply(pool)
