"""Look at several adapters together: where they meet, where they are strong, what rank their sum needs.

Everything is computed from Gram matrices of the factors, and none of it depends on how an adapter's delta is split into
factors: cosines and energies are those of the deltas, units those of the balanced SVD form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from threading import Lock
from typing import Literal

import torch
from torch import Tensor

from ..adapter import Adapter
from ..layers.blocks import FIRST, LAST, MIDDLE, ModelBlock, blocks_of
from ..merge.engine import merge
from ..merge.merged import Merged
from ..merge.methods.lego import Lego, balance_units, transform_gram
from ..merge.pool import Pool
from ..merge.rank import Rank
from ..merge.report import MergeReport
from ..progress import Progress
from .embedding import pca, tsne

Drawn = Literal["pca", "tsne"]


@dataclass(frozen=True, eq=False)
class Layer:
    """What a survey knows of one layer beyond its `ModuleReport`; adapters are those of that report, in order.

    Args:
        total: Singular values of the exact sum, descending.
        own: Those of every adapter's delta.
        shared_in: Share of common input directions of any two, ``(n, n)``: ``|V_i^T V_j|^2 / min(r_i, r_j)`` for
            orthonormal bases V of what their deltas read, 0 .. 1. By chance it is ``max(r_i, r_j) / d_in``.
        shared_out: The same of what they write.
    """

    total: Tensor
    own: tuple[Tensor, ...]
    shared_in: Tensor
    shared_out: Tensor


@dataclass(frozen=True, eq=False)
class UnitMap:
    """The units of one layer as points in the plane.

    Args:
        layer: Its name. region: The stretch of the model it was chosen for, see `ModelBlock`.
        points: ``(P, 2)``. owner: ``(P,)`` long, positions of the adapters. sizes: ``(P,)``, Frobenius norms.
    """

    layer: str
    region: str
    points: Tensor
    owner: Tensor
    sizes: Tensor


@dataclass(frozen=True, eq=False)
class Survey:
    """Several adapters, looked at together.

    Args:
        report: Of their LEGO merge.
        parts: Blocks of the model. layers: By name.
        maps: Of the largest layer in each region. drawn: How their points were found.
        rank: LEGO's.
    """

    report: MergeReport
    parts: tuple[ModelBlock, ...]
    layers: dict[str, Layer]
    maps: tuple[UnitMap, ...]
    drawn: Drawn
    rank: Rank

    def of(self, layers: Sequence[str]) -> MergeReport:
        """The report of some layers alone."""
        wanted = set(layers)
        return replace(self.report, modules=tuple(module for module in self.report.modules if module.name in wanted))

    def energies(self) -> Tensor:
        """``|delta|_F^2`` of every adapter in every part, ``(parts, N)`` float64; weights included."""
        row = {name: i for i, part in enumerate(self.parts) for name in part.layers}
        table = torch.zeros(len(self.parts), len(self.report.inputs), dtype=torch.float64)
        for module in self.report.modules:
            for i, norm in zip(module.adapters, module.norms, strict=True):
                table[row[module.name], i] += norm**2
        return table

    def kept(self, adapter: int | None = None, layers: Sequence[str] | None = None) -> Tensor:
        """Share of the energy that rank 1, 2, .. in every layer keeps, ``(largest rank,)``; ends at 1.

        Args:
            adapter: Of its delta; ``None``: of the exact sum, which `svd` cuts at that rank. layers: Default all.
        """
        energy = self._squares(adapter, layers).sum(0).cumsum(0)
        return energy / energy[-1] if energy.numel() and energy[-1] > 0 else torch.ones(1, dtype=torch.float64)

    def merged(self) -> float:
        """Share of the exact sum's energy that the LEGO merge keeps, to be compared with `kept` at its rank."""
        sizes = [float(self.layers[module.name].total.square().sum()) for module in self.report.modules]
        lost = sum(module.error**2 * size for module, size in zip(self.report.modules, sizes, strict=True))
        return max(0.0, 1 - lost / sum(sizes)) if sum(sizes) > 0 else 1.0

    def spectrum(self, adapter: int | None = None) -> Tensor:
        """Singular values, root mean square over the layers, ``(largest rank,)``; see `kept`."""
        squares = self._squares(adapter, None)
        return squares.mean(0).sqrt() if len(squares) else torch.zeros(1, dtype=torch.float64)

    def rank_for(self, share: float, layers: Sequence[str] | None = None) -> int:
        """The smallest rank that keeps such a share of the exact sum's energy."""
        return int((self.kept(None, layers) >= share - 1e-12).int().argmax()) + 1

    def origins(self) -> tuple[Tensor, Tensor]:
        """Where the merged units of every part come from: ``pure``, ``mixed``, ``(parts, N)`` float64.

        ``pure`` counts the units made of one adapter alone; of the others everyone in ``mixed`` has its share, by the
        number of units it gave.
        """
        row = {name: i for i, part in enumerate(self.parts) for name in part.layers}
        pure, mixed = torch.zeros(2, len(self.parts), len(self.report.inputs), dtype=torch.float64)
        for module in self.report.modules:
            for cluster in module.clusters:
                table = pure if sum(count > 0 for count in cluster) == 1 else mixed
                for i, count in zip(module.adapters, cluster, strict=True):
                    table[row[module.name], i] += count / sum(cluster)
        return pure, mixed

    def shares(self) -> Tensor:
        """Share of each adapter's own energy in each part, ``(parts, N)``; zeros of one that changes nothing."""
        energies = self.energies()
        return energies / energies.sum(0).clamp_min(torch.finfo(energies.dtype).tiny)

    def pairs(self) -> list[tuple[int, int]]:
        """All pairs of adapters, those that overlap most first."""
        overlap = self.report.overlap()
        pairs = combinations(range(len(overlap)), 2)
        return sorted(pairs, key=lambda pair: (-abs(overlap[pair[0]][pair[1]]), pair))

    def shared(self) -> tuple[Tensor, Tensor]:
        """Shares of common input and output directions, mean over the layers both adapters change, ``(N, N)`` each."""
        n = len(self.report.inputs)
        tables, count = torch.zeros(2, n, n, dtype=torch.float64), torch.zeros(n, n, dtype=torch.float64)
        for module in self.report.modules:
            i = torch.tensor(module.adapters)
            layer = self.layers[module.name]
            tables[:, i[:, None], i] += torch.stack([layer.shared_in, layer.shared_out])
            changed = (torch.tensor(module.norms) > 0).double()
            count[i[:, None], i] += changed[:, None] * changed
        shared_in, shared_out = tables / count.clamp_min(1)
        return shared_in, shared_out

    def _squares(self, adapter: int | None, layers: Sequence[str] | None) -> Tensor:
        """Squared singular values of all layers, ``(layers, largest rank)`` float64, padded with zeros."""
        wanted = None if layers is None else set(layers)
        rows: list[Tensor] = []
        for module in self.report.modules:
            if wanted is not None and module.name not in wanted:
                continue
            layer = self.layers[module.name]
            if adapter is None:
                rows.append(layer.total.square())
            elif adapter in module.adapters:
                rows.append(layer.own[module.adapters.index(adapter)].square())
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)


def survey(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    text_encoder_weights: Sequence[float] | None = None,
    rank: Rank | None = None,
    drawn: Drawn = "pca",
    seed: int = 0,
    progress: Progress | None = None,
) -> Survey:
    """Look at adapters that name their modules alike (see `align`).

    Args:
        adapters, weights, text_encoder_weights, progress: See `merge`.
        rank: Of the LEGO merge that tells where its units come from; default the inputs' mean rank.
        drawn: How units become points: ``"pca"`` of the units as matrices, or ``"tsne"`` of their directions.
        seed: Of t-SNE.

    Raises:
        MergeError: See `merge`; or t-SNE without scikit-learn.
    """
    rank = rank or Rank(1, "x")
    blocks = blocks_of(name for adapter in adapters for name in adapter.modules)
    watch = _Watch(Lego(rank), {name: part.region for part in blocks for name in part.layers})
    result = merge(
        adapters,
        watch,
        weights,
        text_encoder_weights=text_encoder_weights,
        dtype=torch.float32,  # the report is of the merge, not of a file
        progress=progress,
    )
    there = set(watch.layers)
    blocks = [replace(part, layers=tuple(name for name in part.layers if name in there)) for part in blocks]
    maps: list[UnitMap] = []
    for region, candidate in sorted(watch.largest.items(), key=lambda item: _REGIONS.get(item[0], len(_REGIONS))):
        points = pca(candidate.G) if drawn == "pca" else tsne(candidate.G, seed=seed)
        sizes = candidate.G.diagonal().clamp_min(0).sqrt()
        maps.append(UnitMap(candidate.layer, region, points, candidate.owner, sizes))
    return Survey(
        replace(result.report, method="lego"),
        tuple(part for part in blocks if part.layers),
        watch.layers,
        tuple(maps),
        drawn,
        rank,
    )


_REGIONS = {FIRST: 0, MIDDLE: 1, LAST: 2}
_MOST = 400  # units of a map; of more the largest


@dataclass(frozen=True, eq=False)
class _Candidate:
    layer: str
    order: tuple[int, float]
    G: Tensor  # (P, P) Gram matrix of the units as matrices
    owner: Tensor


@dataclass
class _Watch:
    """A merge method that is LEGO, and notes what it sees on the way; batches may come from several threads."""

    lego: Lego
    region: dict[str, str]
    layers: dict[str, Layer] = field(default_factory=dict)
    largest: dict[str, _Candidate] = field(default_factory=dict)
    _one: Lock = field(default_factory=Lock)

    @property
    def rank(self) -> Rank:
        return self.lego.rank

    def __call__(self, pool: Pool) -> Merged:
        gauge = balance_units(pool)
        G_A, G_B = transform_gram(pool, pool.G_A, gauge.R_A), transform_gram(pool, pool.G_B, gauge.R_B.mT)
        # balanced units are orthogonal within their adapter, of length sqrt(S) on both sides
        S = (G_A.diagonal(dim1=1, dim2=2) * G_B.diagonal(dim1=1, dim2=2)).clamp_min(0).sqrt()  # (M, P)
        total = pool.svd.S
        shared_in, shared_out = _shared(pool, G_A), _shared(pool, G_B)
        for m, name in enumerate(pool.names):
            own = tuple(part[m].cpu() for part in pool.split(S, 1))
            self.layers[name] = Layer(total[m].cpu(), own, shared_in[m].cpu(), shared_out[m].cpu())
            order = (len(pool.adapters), float(S[m].square().sum()))
            region = self.region[name]
            with self._one:
                best = self.largest.get(region)
                # of equals the first by name: which batch comes first is up to the threads
                if best is None or (best.order, name) < (order, best.layer):
                    self.largest[region] = _candidate(pool, name, order, (G_A * G_B)[m], S[m])
        return self.lego(pool)


def _candidate(pool: Pool, name: str, order: tuple[int, float], G: Tensor, S: Tensor) -> _Candidate:
    chosen = S.topk(min(_MOST, len(S))).indices.sort().values
    chosen = chosen[S[chosen] > 0]
    owner = torch.tensor(pool.adapters)[pool.owner.cpu()]
    return _Candidate(name, order, G[chosen][:, chosen].cpu(), owner[chosen.cpu()])


def _shared(pool: Pool, G: Tensor) -> Tensor:
    """``|V_i^T V_j|_F^2 / min(r_i, r_j)`` from the Gram matrix of orthogonal units: ``(M, n, n)``."""
    length = G.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    inverse = torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0)
    squares = (inverse[:, :, None] * G * inverse[:, None, :]).square()
    member = torch.nn.functional.one_hot(pool.owner, len(pool.ranks)).to(G)  # (P, n)
    ranks = (length > 0).to(G) @ member  # of the deltas themselves
    return (member.T @ squares @ member) / torch.minimum(ranks[:, :, None], ranks[:, None, :]).clamp_min(1)
