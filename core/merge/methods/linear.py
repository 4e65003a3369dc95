"""Add the factors themselves: what PEFT calls ``linear``. Kept for comparison; it is not the sum of the deltas."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..pool import LinearCombination, Merged, Pool


@dataclass(frozen=True)
class Linear:
    """``A = sum_i sqrt|w_i s_i| A_i``, ``B = sum_i sign(w_i) sqrt|w_i s_i| B_i``: unit j is added to unit j.

    The product has the cross terms ``B_i A_j``, so the result depends on how each trainer happened to order and
    scale its units. Lower ranks are padded with zero units. Unlike PEFT, the sign of a negative weight goes to `B`
    alone, so that one adapter at weight -1 is subtracted.

    Source: PEFT ``add_weighted_adapter(combination_type="linear")``.
    """

    def __call__(self, pool: Pool) -> Merged:
        k = max(pool.ranks)
        place = torch.cat([torch.arange(r, device=pool.c.device) for r in pool.ranks])
        pick = torch.nn.functional.one_hot(place, k).to(pool.c)  # (P, k)
        root = pool.c.abs().sqrt()
        R_A, R_B = pick.T * root[:, None, :], (root * pool.c.sign())[:, :, None] * pick
        return LinearCombination(R_A, R_B, torch.full((pool.batch,), k)).apply(pool)
