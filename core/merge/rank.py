"""The merged rank k: a number, a multiple of the inputs' rank, or the smallest that keeps a share of the energy."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from ..errors import MergeError
from ..fields import Converted
from .pool import Pool

_REMEDY = "give a whole number like 16, a multiple like 1.5x, a share of the energy like 95%, or auto (95%)"


@dataclass(frozen=True)
class Rank:
    """How the merged rank `k` of a module is chosen.

    Args:
        value: Number, in the meaning that `unit` gives it.
        unit: ``""``: k itself. ``"x"``: times the inputs' mean rank ``P / N``. ``"%"``: the smallest k whose exact
            SVD keeps that share of ``|sum of deltas|_F^2``.

    Raises:
        MergeError: Not a positive number, a fractional k, or a share above 100.
    """

    value: float
    unit: str = ""

    def __post_init__(self) -> None:
        valid = math.isfinite(self.value) and self.value > 0 and self.unit in ("", "x", "%")
        if self.unit == "":
            valid = valid and self.value == int(self.value)
        if self.unit == "%":
            valid = valid and self.value <= 100
        if not valid:
            raise MergeError(
                "This is not a rank.",
                expected="at least 1, more than 0x, or above 0% and up to 100%",
                found=str(self),
                remedy=_REMEDY,
            )

    @classmethod
    def parse(cls, rank: RankLike) -> Rank:
        """Read ``16``, ``"1.5x"``, ``"95%"`` or ``"auto"`` (the same as ``"95%"``).

        Raises:
            MergeError: Not a rank.
        """
        if isinstance(rank, Rank):
            return rank
        if rank == "auto":
            return cls(95, "%")
        match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*([x%]?)\s*", str(rank))
        if match is None:
            raise MergeError(
                "This is not a rank.", expected="a rank such as 16, 1.5x or 95%", found=repr(rank), remedy=_REMEDY
            )
        return cls(float(match[1]), match[2])

    def __str__(self) -> str:
        return f"{self.value:.12g}{self.unit}"

    def resolve(self, pool: Pool) -> Tensor:
        """`k` for each module of the pool: ``(M,)`` long, ``1 .. P``."""
        if self.unit == "%":
            energy = pool.svd.S.square().cumsum(1)
            enough = energy >= (self.value / 100 - 1e-12) * energy[:, -1:]
            k = enough.int().argmax(1) + 1
        else:
            wanted = self.value if self.unit == "" else round(self.value * pool.size / len(pool.ranks))
            k = torch.full((pool.batch,), int(wanted), device=pool.device)
        return k.clamp(1, pool.size)


RankLike: TypeAlias = Rank | int | str
"""A rank, or anything `Rank.parse` reads."""

RankField: TypeAlias = Converted[RankLike, Rank]


def rank_field() -> RankField:
    """The `rank` of a merge method: given in any form, stored as a `Rank`, by default the inputs' mean rank."""
    return Converted(Rank.parse, Rank(1, "x"))
