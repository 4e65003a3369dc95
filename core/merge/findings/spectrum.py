"""Findings in the singular values of one LoRA: spikes, unused rank, dead layers, overflow."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import accumulate

from ...errors import name_some
from .examined import Examined, median
from .finding import Finding, largest_first

SPIKE = 8.1
"""A spike is so many times the layer's next singular value, and the largest one of the other layers: in trained LoRAs
the first ratio is mostly below 6. It is just above the usual cap of 8, so that a capped layer is no spike, also after
rounding."""
DEAD = 1e-6
"""Norm of a dead layer, relative to the median layer: below float16's resolution of everything that is added to it."""
UNUSED_SHARE, USED_ENERGY, SMALL_RANK = 0.25, 0.99, 8
"""A rank is unused if a quarter of it keeps 99 % of the energy; from rank 8 on, as smaller files save nothing."""
OVERFLOW = 65504 / 8
"""A magnitude that leaves float16 (at most 65504) less than three doublings."""
_FEW_LAYERS = 4


def spikes(examined: Examined) -> Iterator[Finding]:
    """One singular value far above the rest of its layer and above what is usual in the LoRA.

    Layers of rank 1 have no rest. In a LoRA of which every layer consists of one direction nothing is unusual, unless
    it has fewer than four layers.
    """
    for i in examined.used:
        top = {name: S[:2] for name, S in examined.spectra(i) if len(S) > 1 and S[0] > 0}
        steep = {name: first / second if second else float("inf") for name, (first, second) in top.items()}
        usual = [top[name][0] for name, ratio in steep.items() if ratio < SPIKE]
        if not usual and len(top) >= _FEW_LAYERS:
            continue
        values = {name: min(ratio, top[name][0] / median(usual)) if usual else ratio for name, ratio in steep.items()}
        found = largest_first(values, SPIKE)
        if found:
            label, value = examined.labels[i], values[found[0]]
            yield Finding(
                "spike", (label,), tuple(found), value, SPIKE,
                f"{label} has a spectral spike in {_layers(found)}: one singular value is {value:.3g} times the next "
                f"one and those of the other layers ({SPIKE:g} or more is a spike)",
                "merge or convert it with cap 8, which limits the largest singular value of each layer",
            )  # fmt: skip


def dead_layers(examined: Examined) -> Iterator[Finding]:
    """Layers that change nothing, in LoRAs that change something; LoRAs with the same dead layers share a finding."""
    groups: defaultdict[tuple[str, ...], list[int]] = defaultdict(list)
    for i in examined.used:
        norms = examined.norms[i]
        alive = [norm for norm in norms.values() if norm > 0]
        limit = DEAD * median(alive) if alive else 0.0
        groups[tuple(name for name, norm in norms.items() if norm <= limit)].append(i)
    for dead, loras in groups.items():
        if dead:
            labels = tuple(examined.labels[i] for i in loras)
            layers = min(len(examined.norms[i]) for i in loras)
            yield Finding(
                "dead", labels, dead, len(dead) / layers, 0.0,
                f"{len(dead)} of the {layers} layers of {name_some(labels)} change nothing: {name_some(dead)} (sizes "
                f"of at most {DEAD:g} of the median layer's)",
                "use another checkpoint if these layers should have been trained, else ignore it",
            )  # fmt: skip


def unused_rank(examined: Examined) -> Iterator[Finding]:
    """A rank far above what the LoRA uses."""
    for i in examined.used:
        stored = used = 0
        for _, S in examined.spectra(i):
            if S[0] > 0:
                stored += len(S)
                used += rank_for(S, USED_ENERGY)
        layers = sum(1 for _ in examined.spectra(i))
        label = examined.labels[i]
        if stored >= SMALL_RANK * layers and used <= UNUSED_SHARE * stored:
            mean = stored / layers
            yield Finding(
                "rank_unused", (label,), (), used / stored, UNUSED_SHARE,
                f"{label} uses {used / stored:.0%} of its rank: {USED_ENERGY:.0%} of its energy is in rank "
                f"{used / layers:.3g} of {mean:.3g} ({UNUSED_SHARE:.0%} or less is reported)",
                f"compress it to {USED_ENERGY:.0%}: the file becomes smaller, the pictures stay the same",
            )  # fmt: skip


def overflows(examined: Examined) -> Iterator[Finding]:
    """Magnitudes near the limit of float16. A spike reaches it first: the value bounds all entries."""
    for i in examined.used:
        longest = {
            module.name: examined.values[module.name].longest[module.adapters.index(i)]
            for module in examined.modules
            if i in module.adapters
        }
        near = largest_first(longest, OVERFLOW)
        if near:
            label, value = examined.labels[i], longest[near[0]]
            yield Finding(
                "overflow", (label,), tuple(near), value, OVERFLOW,
                f"{label} has magnitudes of up to {value:.3g} in {_layers(near)}, near float16's limit of 65504 (from "
                f"{OVERFLOW:g} on)",
                "save the merge as bfloat16 or float32, or use another checkpoint",
            )  # fmt: skip


def _layers(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{len(names)} layers ({name_some(names)})"


def rank_for(S: Sequence[float], share: float) -> int:
    """Number of the largest singular values that hold a share of their energy."""
    wanted = share * sum(value**2 for value in S)
    for rank, energy in enumerate(accumulate(value**2 for value in S), 1):
        if energy >= wanted:
            return rank
    return len(S)
