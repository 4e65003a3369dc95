"""Compare several adapters: where they overlap, in which blocks they are strong, what rank their sum needs.

Everything is computed from Gram matrices of the factors and does not depend on how a delta is split into factors:
cosines and energies are those of the deltas, units those of the balanced SVD form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import combinations
from threading import Lock

import torch
from torch import Tensor

from ..adapter import Adapter
from ..layers.blocks import FIRST, LAST, MIDDLE, ModelBlock, blocks_of
from ..merge.merged import Merged
from ..merge.methods.lego import Lego, balance_units, transform_gram
from ..merge.pool import Pool
from ..merge.rank import Rank
from ..merge.report import MergeReport
from ..progress import Progress
from .embedding import pca
from .sound import merge_sound_layers


@dataclass(frozen=True, eq=False)
class LayerSpectra:
    """Singular values and common directions of one layer; adapters in the order of its `ModuleReport`.

    Args:
        of_sum: Singular values of the exact sum of the deltas, descending.
        of_adapters: Singular values of each adapter's delta.
        shared_in: Share of common input directions of any two adapters, ``(n, n)``:
            ``|V_i^T V_j|_F^2 / min(r_i, r_j)`` for orthonormal bases V of the row spaces of their deltas, 0 .. 1. For
            random deltas it is ``max(r_i, r_j) / d_in``.
        shared_out: Share of common output directions, likewise from the column spaces.
    """

    of_sum: Tensor
    of_adapters: tuple[Tensor, ...]
    shared_in: Tensor
    shared_out: Tensor


@dataclass(frozen=True, eq=False)
class UnitMap:
    """Units of one layer as points in the plane.

    Args:
        layer: Name of the layer.
        section: Section of the model that the layer represents, see `ModelBlock`.
        points: Principal components of the units as matrices, ``(P, 2)``.
        owner: Position of each unit's adapter, ``(P,)`` long.
        sizes: Frobenius norms of the units, ``(P,)``.
    """

    layer: str
    section: str
    points: Tensor
    owner: Tensor
    sizes: Tensor


@dataclass(frozen=True, eq=False)
class Survey:
    """Comparison of several adapters.

    Args:
        report: Report of their LEGO merge, with the findings.
        blocks: Blocks of the model with the layers that were merged.
        layers: Layer name -> its spectra.
        unit_maps: Units of the largest layer in each section.
        rank: Rank of the LEGO merge.
    """

    report: MergeReport
    blocks: tuple[ModelBlock, ...]
    layers: dict[str, LayerSpectra]
    unit_maps: tuple[UnitMap, ...]
    rank: Rank

    def report_of(self, layers: Sequence[str]) -> MergeReport:
        """Return the report of the LEGO merge, restricted to some layers."""
        wanted = set(layers)
        return replace(self.report, modules=tuple(module for module in self.report.modules if module.name in wanted))

    def energies(self) -> Tensor:
        """Return ``|delta|_F^2`` of every adapter in every block, weights included: ``(blocks, N)`` float64."""
        row = self._block_of_layer()
        table = torch.zeros(len(self.blocks), len(self.report.inputs), dtype=torch.float64)
        for module in self.report.modules:
            for i, norm in zip(module.adapters, module.norms, strict=True):
                table[row[module.name], i] += norm**2
        return table

    def energy_shares(self) -> Tensor:
        """Return how each adapter's energy is spread over the blocks, ``(blocks, N)``; zeros for a zero delta."""
        energies = self.energies()
        return energies / energies.sum(0).clamp_min(torch.finfo(energies.dtype).tiny)

    def energy_by_rank(self, adapter: int | None = None, layers: Sequence[str] | None = None) -> Tensor:
        """Return the share of energy kept by the best approximation of rank 1, 2, .. in every layer.

        Args:
            adapter: Position of the adapter to approximate; default the exact sum, which `svd` truncates.
            layers: Names of the layers to count; default all.

        Returns:
            Shares ``(largest rank,)``, the last of which is 1.
        """
        energy = self._squares(adapter, layers).sum(0).cumsum(0)
        return energy / energy[-1] if energy.numel() and energy[-1] > 0 else torch.ones(1, dtype=torch.float64)

    def lego_energy(self) -> float:
        """Return the share of the exact sum's energy that the LEGO merge keeps, comparable to `energy_by_rank`."""
        sizes = [float(self.layers[module.name].of_sum.square().sum()) for module in self.report.modules]
        lost = sum(module.error**2 * size for module, size in zip(self.report.modules, sizes, strict=True))
        return max(0.0, 1 - lost / sum(sizes)) if sum(sizes) > 0 else 1.0

    def spectrum(self, adapter: int | None = None) -> Tensor:
        """Return the root mean square over the layers of the singular values, ``(largest rank,)``.

        Args:
            adapter: Position of the adapter; default the exact sum.
        """
        squares = self._squares(adapter, None)
        return squares.mean(0).sqrt() if len(squares) else torch.zeros(1, dtype=torch.float64)

    def rank_for(self, share: float, layers: Sequence[str] | None = None) -> int:
        """Return the smallest rank that keeps a share of the exact sum's energy."""
        return int((self.energy_by_rank(None, layers) >= share - 1e-12).int().argmax()) + 1

    def unit_origins(self) -> tuple[Tensor, Tensor]:
        """Count the units of the LEGO merge by block and by the adapter they come from.

        Returns:
            ``pure``: units from one adapter alone, and ``mixed``: units from several adapters, divided among them in
            proportion to the number of units each contributed. ``(blocks, N)`` float64 each.
        """
        row = self._block_of_layer()
        pure, mixed = torch.zeros(2, len(self.blocks), len(self.report.inputs), dtype=torch.float64)
        for module in self.report.modules:
            for cluster in module.clusters:
                table = pure if sum(count > 0 for count in cluster) == 1 else mixed
                for i, count in zip(module.adapters, cluster, strict=True):
                    table[row[module.name], i] += count / sum(cluster)
        return pure, mixed

    def pairs(self) -> list[tuple[int, int]]:
        """Return all pairs of adapters, by decreasing overlap."""
        overlap = self.report.overlap()
        pairs = combinations(range(len(overlap)), 2)
        return sorted(pairs, key=lambda pair: (-abs(overlap[pair[0]][pair[1]]), pair))

    def shared_directions(self) -> tuple[Tensor, Tensor]:
        """Return the shares of common input and of common output directions, ``(N, N)`` each.

        They are means over the layers that both adapters change.
        """
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

    def _block_of_layer(self) -> dict[str, int]:
        return {name: i for i, block in enumerate(self.blocks) for name in block.layers}

    def _squares(self, adapter: int | None, layers: Sequence[str] | None) -> Tensor:
        """Squared singular values of all layers, ``(layers, largest rank)`` float64, padded with zeros."""
        wanted = None if layers is None else set(layers)
        rows: list[Tensor] = []
        for module in self.report.modules:
            if wanted is not None and module.name not in wanted:
                continue
            layer = self.layers[module.name]
            if adapter is None:
                rows.append(layer.of_sum.square())
            elif adapter in module.adapters:
                rows.append(layer.of_adapters[module.adapters.index(adapter)].square())
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True) if rows else torch.zeros(0, 0)


def survey(
    adapters: Sequence[Adapter],
    weights: Sequence[float] | None = None,
    *,
    text_encoder_weights: Sequence[float] | None = None,
    rank: Rank | None = None,
    progress: Progress | None = None,
) -> Survey:
    """Compare adapters whose module names agree (see `align`). Layers with NaN or infinity are left out, and found.

    Args:
        adapters, weights, text_encoder_weights, progress: See `merge`.
        rank: Rank of the LEGO merge whose units are traced back to the adapters; default the inputs' mean rank.

    Raises:
        MergeError: See `merge`.
    """
    rank = rank or Rank(1, "x")
    blocks = blocks_of(name for adapter in adapters for name in adapter.modules)
    method = _MeasuringLego(Lego(rank), {name: block.section for block in blocks for name in block.layers})
    result = merge_sound_layers(
        adapters,
        method,
        weights,
        text_encoder_weights=text_encoder_weights,
        dtype=torch.float32,  # errors of the merge alone, without rounding to a file's dtype
        progress=progress,
    )
    blocks = [replace(block, layers=tuple(name for name in block.layers if name in method.layers)) for block in blocks]
    by_section = sorted(method.largest.items(), key=lambda item: _SECTION_ORDER.get(item[0], len(_SECTION_ORDER)))
    return Survey(
        replace(result.report, method="lego"),
        tuple(block for block in blocks if block.layers),
        method.layers,
        tuple(layer.unit_map(section) for section, layer in by_section),
        rank,
    )


_SECTION_ORDER = {FIRST: 0, MIDDLE: 1, LAST: 2}
_MAP_UNITS = 400  # units on a map, at most: the largest


@dataclass(frozen=True, eq=False)
class _LayerUnits:
    """Units of the largest layer seen so far in a section.

    Args:
        size: Number of adapters that change the layer, and energy of their units.
        G: Gram matrix ``(P, P)`` of the units as matrices.
        owner: Position of each unit's adapter, ``(P,)`` long.
    """

    name: str
    size: tuple[int, float]
    G: Tensor
    owner: Tensor

    def unit_map(self, section: str) -> UnitMap:
        return UnitMap(self.name, section, pca(self.G), self.owner, self.G.diagonal().clamp_min(0).sqrt())


@dataclass
class _MeasuringLego:
    """`Lego` as a merge method that also measures every batch; batches may come from several threads."""

    lego: Lego
    section: dict[str, str]
    layers: dict[str, LayerSpectra] = field(default_factory=dict)
    largest: dict[str, _LayerUnits] = field(default_factory=dict)
    _lock: Lock = field(default_factory=Lock)

    @property
    def rank(self) -> Rank:
        return self.lego.rank

    def __call__(self, pool: Pool) -> Merged:
        balanced = balance_units(pool)
        G_A, G_B = transform_gram(pool, pool.G_A, balanced.R_A), transform_gram(pool, pool.G_B, balanced.R_B.mT)
        # balanced units are orthogonal within their adapter, of length sqrt(S) on both sides
        S = (G_A.diagonal(dim1=1, dim2=2) * G_B.diagonal(dim1=1, dim2=2)).clamp_min(0).sqrt()  # (M, P)
        of_sum = pool.svd.S
        shared_in, shared_out = _shared_directions(pool, G_A), _shared_directions(pool, G_B)
        for m, name in enumerate(pool.names):
            of_adapters = tuple(part[m].cpu() for part in pool.split(S, 1))
            self.layers[name] = LayerSpectra(of_sum[m].cpu(), of_adapters, shared_in[m].cpu(), shared_out[m].cpu())
            size = (len(pool.adapters), float(S[m].square().sum()))
            section = self.section[name]
            with self._lock:
                best = self.largest.get(section)
                # among equals the first by name, because threads may finish batches in any order
                if best is None or (best.size, name) < (size, best.name):
                    self.largest[section] = _layer_units(pool, name, size, (G_A * G_B)[m], S[m])
        return self.lego(pool)


def _layer_units(pool: Pool, name: str, size: tuple[int, float], G: Tensor, S: Tensor) -> _LayerUnits:
    chosen = S.topk(min(_MAP_UNITS, len(S))).indices.sort().values
    chosen = chosen[S[chosen] > 0]
    owner = torch.tensor(pool.adapters)[pool.owner.cpu()]
    return _LayerUnits(name, size, G[chosen][:, chosen].cpu(), owner[chosen.cpu()])


def _shared_directions(pool: Pool, G: Tensor) -> Tensor:
    """Return ``|V_i^T V_j|_F^2 / min(r_i, r_j)`` from the Gram matrix of orthogonal units, ``(M, n, n)``."""
    length = G.diagonal(dim1=1, dim2=2).clamp_min(0).sqrt()
    inverse = torch.where(length > 0, 1 / torch.where(length > 0, length, 1), 0)
    squares = (inverse[:, :, None] * G * inverse[:, None, :]).square()
    member = torch.nn.functional.one_hot(pool.owner, len(pool.ranks)).to(G)  # (P, n)
    ranks = (length > 0).to(G) @ member  # true ranks of the deltas
    return (member.T @ squares @ member) / torch.minimum(ranks[:, :, None], ranks[:, None, :]).clamp_min(1)
