"""Examined: what findings are found in, the values of a merge layer by layer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...adapter import Adapter
from ...layers.blocks import ModelBlock, blocks_of
from ..report import ModuleReport, inner_products
from .measure import LayerValues


@dataclass(frozen=True, eq=False)
class Examined:
    """Adapters with the values of their merged layers.

    Args:
        adapters: The adapters of the merge.
        modules: Reports of the merged layers. Norms include the magnitude of the user's weights; cosines are those of
            the LoRAs, also where a weight is negative.
        values: Layer -> its values.
    """

    adapters: Sequence[Adapter]
    modules: Sequence[ModuleReport]
    values: Mapping[str, LayerValues]

    @cached_property
    def labels(self) -> tuple[str, ...]:
        return tuple(adapter.label for adapter in self.adapters)

    @cached_property
    def used(self) -> list[int]:
        """Positions of the adapters with at least one merged layer."""
        return sorted({i for module in self.modules for i in module.adapters})

    @cached_property
    def norms(self) -> list[dict[str, float]]:
        """Per adapter: layer -> Frobenius norm of its delta, weight included."""
        tables: list[dict[str, float]] = [{} for _ in self.adapters]
        for module in self.modules:
            for i, norm in zip(module.adapters, module.norms, strict=True):
                tables[i][module.name] = norm
        return tables

    @cached_property
    def inner(self) -> Tensor:
        """``<delta_i, delta_j>`` over all layers, ``(N, N)`` float64, with the magnitudes of the user's weights."""
        return inner_products(self.modules, len(self.adapters))

    @cached_property
    def cosine(self) -> list[list[float]]:
        """Cosines of the LoRAs over all layers, also those that only one of them changes: ``N x N``."""
        size = self.inner.diagonal().clamp_min(0).sqrt()
        product = size[:, None] * size
        return torch.where(product > 0, self.inner / torch.where(product > 0, product, 1), 0).tolist()

    @cached_property
    def blocks(self) -> list[ModelBlock]:
        return blocks_of(module.name for module in self.modules)

    def spectra(self, adapter: int) -> Iterable[tuple[str, Sequence[float]]]:
        """Layer and singular values of each of an adapter's layers, without the user's weight."""
        for module in self.modules:
            if adapter in module.adapters:
                yield module.name, self.values[module.name].spectra[module.adapters.index(adapter)]

    def inner_by_block(self) -> dict[str, list[list[float]]]:
        """Block -> `inner` over its layers, ``N x N``."""
        n = len(self.adapters)
        block_of = {layer: block.name for block in self.blocks for layer in block.layers}
        tables = {block.name: [[0.0] * n for _ in range(n)] for block in self.blocks}
        for module in self.modules:
            table = tables[block_of[module.name]]
            for a, i in enumerate(module.adapters):
                for b, j in enumerate(module.adapters):
                    table[i][j] += module.norms[a] * module.norms[b] * module.cosine[a][b]
        return tables

    def entries(self, adapter: int, layers: Iterable[str]) -> int:
        """Number of weights that an adapter changes in some layers."""
        modules = self.adapters[adapter].modules
        return sum(modules[name].d_in * modules[name].d_out for name in layers if name in modules)


def root_mean_square(values: Sequence[float]) -> float:
    """Root mean square of norms; 0 for none."""
    return math.sqrt(sum(value**2 for value in values) / len(values)) if values else 0.0


def median(values: Sequence[float]) -> float:
    """The lower median: of an even number of values the smaller one of the middle two."""
    return sorted(values)[(len(values) - 1) // 2]
