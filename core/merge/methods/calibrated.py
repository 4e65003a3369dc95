"""Calibrated merge: the update that, on measured inputs, acts most like each LoRA it replaces."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import MergeError
from ...fields import REQUIRED
from ..merged import Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from ..statistics import ModuleStatistics, Statistics
from .svd import SVD

# Defaults of `Calibrated`. LAM, MU: weights of prompts that name no concept, and several.
LAM, MU = 0.3, 10.0
JOINT_SCALE = 1.2
"""Strength of LoRAs that a prompt names together, relative to each one alone: their sum loses some of each."""
# Weight of the plain sum in directions that were never measured, relative to the mean measured one.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Calibrated:
    """Least squares on second moments `C` of the inputs, then the best rank-k approximation.

    Given the moments ``C_i`` for prompts that name concept i alone, ``C_S`` for prompts that name the concepts S
    together and ``C_0`` for prompts that name none, `W` minimises (with ``|E|_C^2 = tr(E C E^T)``)

        sum_i |W - delta_i|^2_{C_i} + mu sum_S |W - joint_scale sum_{i in S} delta_i|^2_{C_S}
            + lam |W|^2_{C_0} + tau |W - sum_i delta_i|^2

    hence ``W = sum_i delta_i M_i G^-1`` with ``M_i = C_i + mu joint_scale sum_{S with i} C_S + tau I`` and
    ``G = sum_i C_i + mu sum_S C_S + lam C_0 + tau I``; tau is a thousandth of the mean eigenvalue of the rest of `G`.
    It is ``B`` times a ``(P, d_in)`` matrix, so its rank is at most `P` and nothing of size ``d_out * d_in`` is formed.
    The cost is a float64 Cholesky factorisation of `G` per module: ``(d_in, d_in)`` for full statistics, a small
    ``(q + 1, q + 1)`` for light ones, see `core.merge.statistics`.

    A module without statistics gets the plain SVD of the sum, and a remark in the report.

    Args:
        rank: Merged rank; a share of the energy refers to `W`.
        statistics: Measured moments; their positions refer to the merge's list of adapters (`Statistics.of`). A
            concept's inputs also count in a module that its adapter does not have, where they ask for no change.
        lam: Weight of leaving the base model alone, at least 0.
        mu: Weight of the prompts that name several concepts, at least 0.
        joint_scale: Strength of several LoRAs together, relative to their sum.

    Source: RegMean, arXiv:2212.09849, extended by the joint and the base term.
    """

    rank: RankField = rank_field()
    statistics: Statistics = REQUIRED
    lam: float = LAM
    mu: float = MU
    joint_scale: float = JOINT_SCALE

    def __post_init__(self) -> None:
        if self.statistics is REQUIRED:
            raise MergeError(
                "A calibrated merge needs statistics.", remedy="measure them first, see docs/calibrated.md"
            )
        if not (self.lam >= 0 and self.mu >= 0):
            raise MergeError(
                "A weight of the calibrated merge is negative.",
                expected="lam and mu of 0 or more",
                found=f"lam {self.lam:g}, mu {self.mu:g}",
            )

    def __call__(self, pool: Pool) -> Merged:
        responsive, unmeasured = calibrate_units(pool, self.statistics, self.lam, self.mu, self.joint_scale)
        merged = SVD(self.rank)(responsive)
        return replace(merged, remarks=dict.fromkeys(unmeasured, "have no statistics and got the plain SVD of the sum"))


def calibrate_units(
    pool: Pool, statistics: Statistics, lam: float = LAM, mu: float = MU, joint_scale: float = JOINT_SCALE
) -> tuple[Pool, list[str]]:
    """Units that respond to their LoRA's concept: rows ``A_i M_i G^-1``, so that their sum is `Calibrated`'s `W`.

    Args:
        pool: The original units. statistics, lam, mu, joint_scale: See `Calibrated`.

    Returns:
        The pool with the new rows, weights and scales folded into them; and the names of modules without statistics,
        whose units are unchanged.

    Raises:
        MergeError: Statistics of other layers, or matrices that are no second moments.
    """
    A = pool.c[:, :, None].to(pool.A) * pool.A
    unmeasured: list[str] = []
    for m, name in enumerate(pool.names):
        moments = statistics.modules.get(name)
        if moments is None:
            unmeasured.append(name)
        else:
            A[m] = _solve(name, moments, A[m].double(), pool, lam, mu, joint_scale).to(A)
    return pool.with_units(A, pool.B), unmeasured


def check_width(name: str, moments: ModuleStatistics, A: Tensor) -> None:
    """Raise MergeError unless the statistics of a module fit its rows ``A (P, d_in)``."""
    if moments.d_in != A.shape[1]:
        raise MergeError(
            "The statistics belong to another model.",
            module=name,
            expected=f"inputs of width {A.shape[1]}",
            found=moments.d_in,
            remedy="measure the statistics with the base model of these LoRAs",
        )


def _solve(
    name: str, moments: ModuleStatistics, A: Tensor, pool: Pool, lam: float, mu: float, joint_scale: float
) -> Tensor:
    """``[A_1 M_1; ..; A_N M_N] G^-1``, ``(P, d_in)`` float64, for scaled rows `A`."""
    check_width(name, moments, A)
    # (C, its weight in the objective, scale of the wanted sum, the adapters in that sum)
    terms = [(C, 1.0, 1.0, (i,)) for i, C in moments.own.items()]
    terms += [(C, mu, joint_scale, group) for group, C in moments.joint.items()]
    terms += [] if moments.base is None else [(moments.base, lam, 0.0, ())]
    space = moments.space(A)
    X = space.X
    G, rows = X.new_zeros(X.shape[1], X.shape[1]), torch.zeros_like(X)
    for C, weight, scale, group in terms:
        C = weight * C.to(X)
        G += C
        wanted = torch.tensor([pool.adapters[i] in group for i in pool.owner.tolist()], device=X.device)
        rows[wanted] += scale * X[wanted] @ C
    tau = float(_RIDGE * space.mean(G)) or 1.0
    rows += tau * X
    G.diagonal().add_(tau)
    factor, fault = torch.linalg.cholesky_ex(G)
    if int(fault) or not torch.isfinite(factor.sum()):
        raise MergeError(
            "The statistics are not second moments of a module's inputs.",
            module=name,
            expected="finite positive semidefinite matrices",
            found="NaN, infinity or a negative eigenvalue",
            remedy="measure the statistics again, in float32",
        )
    return space.rows(torch.cholesky_solve(rows.mT, factor).mT)
