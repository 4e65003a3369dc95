"""Concatenate the units of all adapters: the exact sum of their deltas, at the summed rank."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..merged import LinearCombination, Merged
from ..pool import Pool


@dataclass(frozen=True)
class Concat:
    """``delta = sum_i w_i scale_i B_i A_i``, exactly, with rank ``P = sum_i r_i``.

    Source: arXiv:2409.16167, concatenation-summation equivalence; PEFT's ``combination_type="cat"``.
    """

    def __call__(self, pool: Pool) -> Merged:
        return fold_scales(pool).apply(pool)


def fold_scales(pool: Pool) -> LinearCombination:
    """``A <- sqrt|c| A``, ``B <- sign(c) sqrt|c| B`` with ``c = weight * scale``: every unit gets its true size."""
    root = pool.c.abs().sqrt()
    ranks = torch.full((pool.batch,), pool.size)
    return LinearCombination(torch.diag_embed(root), torch.diag_embed(root * pool.c.sign()), ranks)
