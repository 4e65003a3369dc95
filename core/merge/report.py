"""The report of a merge: as plain data, as text, and as JSON for the file's metadata."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor

from .account import Prediction
from .findings.finding import Finding

MANY = 16
"""With more adapters than this, figures for each pair are reported for the whole merge, not for every module."""
SAME, SHARED = 0.9, 0.3
"""Cosines above which two adapters are called nearly the same, and are said to share a direction."""
_PREDICTED = 8  # adapters in the table of predictions
_SHOWN = 20  # lines of a longer list that are shown


@dataclass(frozen=True)
class ModuleReport:
    """One merged module.

    Args:
        name: Module name.
        adapters: Positions of the adapters that have it.
        ranks_in: Ranks of these adapters. rank_out: The merged rank.
        norms: Frobenius norm of each adapter's delta, weight included.
        cosine: Overlap of the adapters' deltas, ``N x N``: 1 the same direction, 0 unrelated, -1 opposite.
        error: ``|merged - sum of deltas| / |sum of deltas|`` (Frobenius) of the factors as they are stored: 0 is the
            exact sum. Rounding to the output's dtype is part of it, about 3e-4 in float16 and 2e-3 in bfloat16, and so
            is what was cut off when a file that is not low rank was approximated.
        clusters: For a clustering method: per merged unit, how many units came from each adapter.
    """

    name: str
    adapters: tuple[int, ...]
    ranks_in: tuple[int, ...]
    rank_out: int
    norms: tuple[float, ...]
    cosine: tuple[tuple[float, ...], ...]
    error: float
    clusters: tuple[tuple[int, ...], ...] = ()

    @property
    def energy_kept(self) -> float:
        """Share of the sum's squared norm that the merge reproduces, ``1 - error^2``, at least 0."""
        return max(0.0, 1.0 - self.error**2)


@dataclass(frozen=True)
class MergeReport:
    """One merge.

    Args:
        inputs: Labels of the adapters. weights: Merge weights of the adapters.
        method: The method's name in ``METHODS``.
        modules: One entry per merged module.
        passed_on: Keys carried into the result unchanged, or summed (diffs), with their origin.
        dropped: Keys that could not be kept, with the reason; shown in every rendering.
        notes: Sentences on anything unusual about these inputs.
        predicted: What this merge and others of its rank are predicted to keep; empty without statistics.
        findings: Faults and risks of the inputs, the most severe first.
    """

    inputs: tuple[str, ...]
    weights: tuple[float, ...]
    method: str
    modules: tuple[ModuleReport, ...]
    passed_on: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    predicted: tuple[Prediction, ...] = ()
    findings: tuple[Finding, ...] = ()

    @property
    def energy_kept(self) -> float:
        """Mean of `ModuleReport.energy_kept` over all modules, weighted by the size of their deltas."""
        return _weighted_mean(
            [module.energy_kept for module in self.modules], [_size(module) for module in self.modules]
        )

    @property
    def ranks_out(self) -> tuple[int, int]:
        """Smallest and largest merged rank."""
        ranks = [module.rank_out for module in self.modules]
        return min(ranks, default=0), max(ranks, default=0)

    def overlap(self) -> list[list[float]]:
        """Overlap of any two adapters over the modules they share, weighted by size: ``N x N`` cosines."""
        inner, sizes = _inner_and_sizes(self.modules, len(self.inputs))
        table = torch.where(sizes > 0, inner / torch.where(sizes > 0, sizes, 1), 0)
        return table.fill_diagonal_(1).tolist()

    def mixed_clusters(self) -> float | None:
        """Share of merged units made of units of several adapters; ``None`` for methods that do not cluster."""
        clusters = [cluster for module in self.modules for cluster in module.clusters]
        if not clusters:
            return None
        return sum(sum(count > 0 for count in cluster) > 1 for cluster in clusters) / len(clusters)

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON: the fields above plus the totals.

        With more adapters than `MANY` the modules' cosines are left out: they would be millions of numbers.
        """
        modules = self.modules
        if len(self.inputs) > MANY:
            modules = tuple(replace(module, cosine=()) for module in modules)
        data = asdict(replace(self, modules=modules))
        data["energy_kept"] = self.energy_kept
        data["overlap"] = self.overlap()
        return data

    def text(self) -> str:
        """A summary for people: the figures, then the keys passed on and dropped, and the notes."""
        low, high = self.ranks_out
        rank = str(low) if low == high else f"{low} to {high}"
        lines = [
            f"{self.method}: {len(self.inputs)} LoRA{'s' * (len(self.inputs) != 1)}, {len(self.modules)} modules, "
            f"merged rank {rank}, {self.energy_kept:.1%} of the sum's energy kept",
        ]
        overlap = self.overlap()
        for i, (name, weight) in enumerate(zip(self.inputs, self.weights, strict=True)):
            count = sum(i in module.adapters for module in self.modules)
            size = sum(m.norms[m.adapters.index(i)] ** 2 for m in self.modules if i in m.adapters) ** 0.5
            lines.append(f"  [{i + 1}] {name}: weight {weight:g}, {count} modules, size {size:.3g}")
        pairs = list(combinations(range(len(self.inputs)), 2))
        shown = pairs
        if len(self.inputs) > MANY:
            shown = sorted(pairs, key=lambda pair: (-abs(overlap[pair[0]][pair[1]]), pair))[:_SHOWN]
        for i, j in shown:
            lines.append(f"  overlap [{i + 1}] and [{j + 1}]: {overlap[i][j]:+.3f} ({_describe_cosine(overlap[i][j])})")
        if len(shown) < len(pairs):
            lines.append(f"  {len(pairs) - len(shown)} more pairs overlap less (all of them in the JSON report)")
        mixed = self.mixed_clusters()
        if mixed is not None:
            lines.append(f"  {mixed:.0%} of the merged units blend several LoRAs, the rest come from one each")
        lines += [f"  {finding.line}" for finding in self.findings]
        lines += _predicted(self.predicted)
        lines += _section("passed on", self.passed_on) + _section("DROPPED", self.dropped)
        lines += [f"  note: {note}" for note in self.notes]
        return "\n".join(lines)


def inner_products(modules: Sequence[ModuleReport], adapters: int) -> Tensor:
    """``<delta_i, delta_j>`` of any two adapters, weights included, summed over modules: ``(N, N)`` float64."""
    return _inner_and_sizes(modules, adapters)[0]


def _inner_and_sizes(modules: Sequence[ModuleReport], adapters: int) -> tuple[Tensor, Tensor]:
    """Sums of ``<delta_i, delta_j>`` and of ``|delta_i| |delta_j|`` over modules, ``(N, N)`` float64 each."""
    inner, sizes = (torch.zeros(adapters, adapters, dtype=torch.float64) for _ in range(2))
    by_adapters: defaultdict[tuple[int, ...], list[ModuleReport]] = defaultdict(list)
    for module in modules:
        by_adapters[module.adapters].append(module)
    for positions, group in by_adapters.items():
        i = torch.tensor(positions, dtype=torch.long)
        norms = torch.tensor([module.norms for module in group], dtype=torch.float64)
        size = norms[:, :, None] * norms[:, None, :]
        cosine = torch.tensor([module.cosine for module in group], dtype=torch.float64)
        inner[i[:, None], i] += (size * cosine).sum(0)
        sizes[i[:, None], i] += size.sum(0)
    return inner, sizes


def _predicted(predictions: Sequence[Prediction]) -> list[str]:
    if not predictions:
        return []
    adapters = len(predictions[0].alone)
    shown = min(adapters, _PREDICTED)
    heads = [f"[{i + 1}]" for i in range(shown)] + ["joint", "base"]
    lines = [
        "  predicted errors, relative to what prompts want that ask for one LoRA, several, or none (0 is best; base: 1 "
        "is the sum):",
        "    " + " " * 16 + "".join(f"{head:>7}" for head in heads),
    ]
    for row in predictions:
        values = [*row.alone[:shown], row.joint, row.base]
        lines.append(f"    {row.method:16}" + "".join("      -" if v is None else f"{v:7.2f}" for v in values))
    return lines


def _size(module: ModuleReport) -> float:
    return sum(norm**2 for norm in module.norms)


def _weighted_mean(values: Sequence[float], sizes: Sequence[float]) -> float:
    total = sum(sizes)
    return sum(v * s for v, s in zip(values, sizes, strict=True)) / total if total > 0 else 0.0


def _describe_cosine(cosine: float) -> str:
    if cosine > SAME:
        return "nearly the same LoRA"
    if cosine > SHARED:
        return "they share a direction"
    if cosine < -SHARED:
        return "they work against each other"
    return "unrelated"


def _section(label: str, names: Sequence[str], limit: int = _SHOWN) -> list[str]:
    if not names:
        return []
    shown = [f"    {name}" for name in names[:limit]]
    if len(names) > limit:
        shown.append(f"    and {len(names) - limit} more (all of them in the JSON report)")
    return [f"  {label} ({len(names)}):", *shown]
