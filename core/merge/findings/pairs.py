"""Findings about two LoRAs: nearly the same, one contained in the other, opposite directions."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import combinations, permutations

from ...errors import name_some
from ..report import MANY, SAME, SHARED
from .examined import Examined
from .finding import Finding

INSIDE = 0.9
"""Share of a LoRA's energy within the directions of another one, of which it is then a part; as for `SAME`."""
COEFFICIENT = 0.5
"""How many times a contained LoRA is found in the other one, at least: less can come from a shared subject."""
OPPOSED = -SHARED
CHANCE = 4.0
"""Standard deviations of the cosine of random deltas that a negative cosine has to exceed as well."""
OPPOSED_ENERGY = 0.05
"""Share of its LoRA's energy that both LoRAs have in opposed blocks, at least: less is not seen."""
_RELATED = 0.15  # cosine: one of 25 equal LoRAs has 0.2 with their sum


def duplicates(examined: Examined) -> Iterator[Finding]:
    """Nearly the same LoRA twice, at any rank, scale, split into factors and naming of layers."""
    for i, j in combinations(examined.used, 2):
        cosine = examined.cosine[i][j]
        if cosine > SAME:
            first, second = examined.labels[i], examined.labels[j]
            yield Finding(
                "duplicate", (first, second), (), cosine, SAME,
                f"{first} and {second} are nearly the same LoRA (cosine {cosine:.3f}, the same above {SAME:g})",
                "leave one of them out, or merge with the suggested strengths",
            )  # fmt: skip


def contained(examined: Examined) -> Iterator[Finding]:
    """One LoRA is a part of another one, such as of a merge that it went into, and would be counted twice."""
    found: set[tuple[int, int]] = set()
    for i, j in permutations(examined.used, 2):
        if (j, i) in found or not _RELATED < examined.cosine[i][j] <= SAME:
            continue
        within, coefficient = _part_of(examined, i, j)
        if within >= INSIDE and coefficient >= COEFFICIENT:
            found.add((i, j))
            part, whole = examined.labels[i], examined.labels[j]
            yield Finding(
                "contained", (part, whole), (), within, INSIDE,
                f"{part} is contained in {whole}: {within:.0%} of its energy is in directions of {whole} ({INSIDE:.0%} "
                f"or more), which holds it {coefficient:.2g} times",
                f"leave {part} out, or merge with the suggested strengths, which count it once",
            )  # fmt: skip


def _part_of(examined: Examined, i: int, j: int) -> tuple[float, float]:
    """Share of delta i within the directions of delta j, and how many times j holds i; without the user's weights."""
    within = product = total = 0.0
    for module in examined.modules:
        if i not in module.adapters:
            continue
        a, values = module.adapters.index(i), examined.values[module.name]
        own = values.energy(a)
        total += own
        if j in module.adapters and values.inside:
            b = module.adapters.index(j)
            within += own * values.inside[a][b]
            product += module.cosine[a][b] * math.sqrt(own * values.energy(b))
    return (within / total, product / total) if total > 0 else (0.0, 0.0)


def opposed(examined: Examined) -> Iterator[Finding]:
    """Two LoRAs have opposite directions, in some blocks or, with more than `MANY` LoRAs, in the whole model."""
    if len(examined.used) < 2:
        return
    if len(examined.adapters) > MANY:
        inner = {"the model": examined.inner.tolist()}
        layers_of = {"the model": frozenset(module.name for module in examined.modules)}
    else:
        inner = examined.inner_by_block()
        layers_of = {block.name: frozenset(block.layers) for block in examined.blocks}
    for i, j in combinations(examined.used, 2):
        below: dict[str, tuple[float, float]] = {}  # block -> cosine and limit
        for name, table in inner.items():
            size = math.sqrt(max(0.0, table[i][i] * table[j][j]))
            cosine = table[i][j] / size if size > 0 else 0.0
            if cosine < OPPOSED:
                limit = min(OPPOSED, -CHANCE / math.sqrt(examined.entries(i, layers_of[name])))
                below |= {name: (cosine, limit)} if cosine < limit else {}
        if not below:
            continue
        share = min(sum(inner[name][k][k] for name in below) / float(examined.inner[k, k]) for k in (i, j))
        if share < OPPOSED_ENERGY:
            continue
        layers = frozenset[str]().union(*(layers_of[name] for name in below))
        value, limit = min(below.values())
        first, second = examined.labels[i], examined.labels[j]
        where = "" if len(below) == len(inner) else f" in {len(below)} of {len(inner)} blocks ({name_some(below)})"
        yield Finding(
            "opposed", (first, second),
            tuple(m.name for m in examined.modules if m.name in layers and i in m.adapters and j in m.adapters),
            value, limit,
            f"{first} and {second} work against each other{where}: cosine {value:+.2f} (opposed below {limit:.2g})",
            "give one of them a lower weight in these layers, or apply them with gates instead of merging them",
        )  # fmt: skip
