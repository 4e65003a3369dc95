"""KnOTS: bring the adapters into one shared basis, then merge there with TIES."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import gram
from ..merged import Merged
from ..pool import Pool
from ..rank import RankField, rank_field
from .consensus import check_density, ties
from .svd import SVD

# Entries of S V_i^T below this share of S[0] are rounding noise.
_NOISE = 1e-7


@dataclass(frozen=True)
class Knots:
    """KnOTS-TIES: ``[delta_1 .. delta_N] = U S [V_1 .. V_N]^T``, TIES on the parts ``S V_i^T``, times ``U``.

    The stack is ``B @ blockdiag(scale_i A_i)``, so `gram.svd` decomposes it from the Gram matrices of the factors:
    no dense delta is formed. The result has rank P at most and is truncated to `k` by exact SVD. As in `Ties` the
    user's weights enter after the election, which is by the sum: a vote by number of signs would depend on the
    arbitrary signs of singular vectors.

    The published code trims over all layers of the model at once; here every module is trimmed on its own, so that
    modules stay independent of each other. It keeps 20 % of the entries for vision models, all for language models.

    Args:
        rank: Merged rank; a share of the energy refers to the merged matrix before it is truncated.
        density: Share of the entries of each ``S V_i^T`` that survive trimming, ``(0, 1]``.

    Source: arXiv:2410.19735.
    """

    rank: RankField = rank_field()
    density: float = 0.5

    def __post_init__(self) -> None:
        check_density(self.density)

    def __call__(self, pool: Pool) -> Merged:
        other_adapter = pool.owner[:, None] != pool.owner  # the blocks of the stack share no column
        svd = gram.svd(pool.G_A.masked_fill(other_adapter, 0), pool.G_B, pool.scale)
        A, B = torch.zeros_like(pool.A), torch.zeros_like(pool.B)
        for m in range(pool.batch):
            n = int((svd.S[m] > 0).sum())
            if n == 0:
                continue
            root = svd.S[m, :n].sqrt()
            # float64: S may be the square of the smallest factors, which float32 would round to zero
            R_A, R_B = root[:, None] * svd.R_A[m, :n], svd.R_B[m, :, :n] / root
            noise = _NOISE * float(svd.S[m, 0])
            part = partial(_part, pool.split(R_A, 1), pool.split(pool.A[m], 0), noise)
            A[m, :n] = ties(part, pool.weights[m].tolist(), self.density) / root[0]  # TIES of S V_i^T
            B[m, :, :n] = pool.B[m].double() @ R_B * root[0]  # U
        return SVD(self.rank)(pool.with_units(A, B))


def _part(R: Sequence[Tensor], A: Sequence[Tensor], noise: float, i: int) -> Tensor:
    """``S V_i^T``. Noise must not count as agreement, or adapters without a common entry would be averaged."""
    part = R[i] @ A[i].double()
    return part.masked_fill(part.abs() < noise, 0)
