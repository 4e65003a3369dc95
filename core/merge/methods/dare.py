"""DARE: drop entries of the dense deltas at random, rescale the rest, add them."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..merged import Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from .consensus import check_density
from .dense import delta, merge_dense


@dataclass(frozen=True)
class Dare:
    """``sum_i w_i delta_i * mask_i / density`` with random masks, then the nearest matrix of rank `k`.

    Its expectation is the plain sum. Every mask depends only on the seed, the module's name and the adapter's
    position, not on batches or on the other adapters.

    Args:
        rank: Merged rank.
        density: Probability that an entry is kept, ``(0, 1]``.
        seed: Random seed of the masks.

    Source: arXiv:2311.03099; PEFT's ``dare_linear_svd``.
    """

    batch: ClassVar[int] = 1

    rank: RankField = rank_field()
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, pool: Pool) -> Merged:
        return merge_dense(pool, self.rank, lambda m: self._sum(pool, m))

    def _sum(self, pool: Pool, m: int) -> Tensor:
        total = pool.A.new_zeros(pool.B.shape[1], pool.A.shape[2])
        for i, weight in enumerate(pool.weights[m].tolist()):
            part = delta(pool, m, i)
            total += weight / self.density * part * self._mask(part, f"{pool.names[m]}/{pool.adapters[i]}")
        return total

    def _mask(self, part: Tensor, name: str) -> Tensor:
        # drawn on the CPU, so that every device drops the same entries
        generator = torch.Generator("cpu").manual_seed(zlib.crc32(f"{self.seed}/{name}".encode()))
        return (torch.rand(part.shape, generator=generator, device="cpu") < self.density).to(part.device)
