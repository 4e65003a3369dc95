"""TIES: trim the dense deltas, elect signs, average the entries that agree."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from ..merged import Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from .consensus import Election, check_density, ties
from .dense import delta, merge_dense


@dataclass(frozen=True)
class Ties:
    """TIES on the dense deltas of each module, then the nearest matrix of rank `k`.

    It averages where adapters agree rather than adding, so it is weaker than a sum: weights above 1 are usual.

    Args:
        rank: Merged rank.
        density: Share of each delta's entries that survive trimming, ``(0, 1]``.
        sign_election: ``"total"``: the sign of the summed deltas. ``"frequency"``: the sign most deltas have.

    Source: arXiv:2306.01708 section 3; PEFT's ``ties_svd``, except that an adapter of weight 0 does not vote.
    """

    batch: ClassVar[int] = 1

    rank: RankField = rank_field()
    density: float = 0.5
    sign_election: Election = "total"

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, pool: Pool) -> Merged:
        return merge_dense(
            pool,
            self.rank,
            lambda m: ties(partial(delta, pool, m), pool.weights[m].tolist(), self.density, self.sign_election),
        )
