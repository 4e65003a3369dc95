"""Values of merged layers that findings need, from the Gram matrices of a pool."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor

from ..pool import Pool
from ..report import ModuleReport

# Cosine of two deltas in a layer from which on it is measured whether one contains the other: one of 25 equal LoRAs
# has a cosine of 0.2 with their sum.
_RELATED = 0.2


@dataclass(frozen=True, eq=False)
class LayerValues:
    """Values of one layer; adapters in the order of its `ModuleReport`. They do not depend on the user's weights.

    Args:
        spectra: Singular values of each adapter's delta, descending.
        longest: Per adapter the length of its longest row of `A` or column of `B`, or its largest singular value if
            that is larger: no value of its factors or its delta has a larger magnitude.
        inside: ``n x n``, the share of the energy of delta i within the row space and the column space of delta j;
            ``()`` if no two deltas are related.
    """

    spectra: tuple[Sequence[float], ...]
    longest: tuple[float, ...]
    inside: Sequence[Sequence[float]] = ()

    def energy(self, adapter: int) -> float:
        """``|delta|_F^2`` of the adapter at a position in the layer's list."""
        return sum(value**2 for value in self.spectra[adapter])


def layer_values(pool: Pool, reports: Sequence[ModuleReport]) -> dict[str, LayerValues]:
    """Measure the layers of a batch.

    Args:
        pool: The units of the batch.
        reports: The reports of its layers, in order.

    Returns:
        Layer -> its values.
    """
    # converted to lists all at once: operations on tensors layer by layer take longer than small merges
    spectra = _spectra(pool)
    lengths = torch.maximum(*(G.diagonal(dim1=1, dim2=2) for G in (pool.G_A, pool.G_B))).clamp_min(0).sqrt().tolist()
    by_layer = list(zip(*(S.tolist() for S in spectra), strict=True))
    longest = (
        tuple(max(*row[span], S[0]) for span, S in zip(pool.spans, layer, strict=True))
        for row, layer in zip(lengths, by_layer, strict=True)
    )
    inside = _inside(pool, reports)
    shares: Sequence[Sequence[Sequence[float]]] = [()] * pool.batch if inside is None else inside.tolist()
    rows = zip(pool.names, by_layer, longest, shares, strict=True)
    return {name: LayerValues(*values) for name, *values in rows}


def _spectra(pool: Pool) -> list[Tensor]:
    """Singular values of every adapter's deltas without the user's weight, ``(M, r_i)`` each."""
    if pool.values.adapter_svds is not None:
        return [svd.S for svd in pool.values.adapter_svds]
    spectra: dict[int, Tensor] = {}
    for rank in dict.fromkeys(pool.ranks):  # adapters of one rank are decomposed together
        alike = [i for i, other in enumerate(pool.ranks) if other == rank]
        spans = [pool.spans[i] for i in alike]
        G_A, G_B = (torch.cat([G[:, span, span] for span in spans]) for G in (pool.G_A, pool.G_B))
        S = _singular_values(G_A, G_B, torch.cat([pool.scale[:, span] for span in spans]))
        spectra |= dict(zip(alike, S.split(pool.batch), strict=True))
    return [spectra[i] for i in range(len(pool.ranks))]


def _singular_values(G_A: Tensor, G_B: Tensor, c: Tensor) -> Tensor:
    """As `gram.svd`, without vectors, in a quarter of the time; ``L L^T = G_A`` is Cholesky's where it exists."""
    L, failed = torch.linalg.cholesky_ex(G_A)
    rest = failed.nonzero()[:, 0]
    if len(rest):
        squares, vectors = torch.linalg.eigh(G_A[rest])
        L[rest] = vectors * squares.clamp_min(0).sqrt()[:, None, :]
    cL = c[:, :, None] * L
    return torch.linalg.eigvalsh(cL.mT @ G_B @ cL).clamp_min(0).sqrt().flip(1)


def _inside(pool: Pool, reports: Sequence[ModuleReport]) -> Tensor | None:
    """`LayerValues.inside` of all layers, ``(M, n, n)``: 1 on the diagonal, 0 for pairs that are not related."""
    n = len(pool.ranks)
    pairs = [
        (i, j) for i, j in permutations(range(n), 2) if any(abs(report.cosine[i][j]) > _RELATED for report in reports)
    ]
    if not pairs:
        return None
    bases = [_orthonormal(svd.S, svd.R_A, svd.R_B) for svd in pool.adapter_svds]
    shares = torch.eye(n, dtype=torch.float64, device=pool.device).repeat(pool.batch, 1, 1)
    for i, j in pairs:
        S = pool.adapter_svds[i].S
        rows = bases[j][0] @ pool.G_A[:, pool.spans[j], pool.spans[i]] @ bases[i][0].mT  # (M, r_j, r_i)
        columns = bases[j][1].mT @ pool.G_B[:, pool.spans[j], pool.spans[i]] @ bases[i][1]
        energy = S.square().sum(1)
        kept = (columns * S[:, None, :] @ rows.mT).square().sum((1, 2))
        shares[:, i, j] = torch.where(energy > 0, kept / torch.where(energy > 0, energy, 1), 0)
    return shares


def _orthonormal(S: Tensor, R_A: Tensor, R_B: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of orthonormal bases of the row space and the column space, from a `GramSVD`."""
    inverse = torch.where(S > 0, 1 / torch.where(S > 0, S, 1).sqrt(), 0)
    return inverse[:, :, None] * R_A, R_B * inverse[:, None, :]
