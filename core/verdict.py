"""A survey in plain sentences.

Where they draw a line: two LoRAs share a direction above a cosine of `report.SHARED`, work against each other below its
negative, and are nearly the same above `report.SAME`, as in a merge's report. One is much larger than another from
`_LOUDER` times its norm on, and at home in a stretch of the model that holds more than `_HOME` of its energy. A rank is
said to do from 95% of the sum's energy on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from .parts import FIRST, LAST, MIDDLE, TEXT
from .report import SAME, SHARED
from .survey import Survey

_LOUDER = 2.0
_HOME = 0.5
_PAIRS = 3  # told of one by one


def sentences(survey: Survey) -> list[str]:
    """What a person should know of these adapters, the most important first."""
    return [*_overlaps(survey), *_sizes(survey), *_homes(survey), *_ranks(survey), *_origins(survey)]


def _overlaps(survey: Survey) -> Iterator[str]:
    names = survey.report.inputs
    regions = _regions(survey)
    local = {region: survey.of(layers).overlap() for region, layers in regions.items()}
    overall = survey.report.overlap()

    def strongest(pair: tuple[int, int]) -> float:
        i, j = pair
        return max(abs(table[i][j]) for table in (overall, *local.values()))

    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: (-strongest(pair), pair))
    if len(pairs) > 1 and strongest(pairs[0]) <= SHARED:
        yield (
            f"The {len(names)} LoRAs hardly touch each other: every cosine is within {strongest(pairs[0]):.2f} of 0, over "
            "the whole model and in each stretch of it."
        )
        return
    for i, j in pairs[:_PAIRS]:
        cosine = overall[i][j]
        where = {region: table[i][j] for region, table in local.items() if len(local) > 1}
        line = f"{names[i]} and {names[j]} {_do(cosine)} (cosine {cosine:+.2f})"
        against = {region: c for region, c in where.items() if c < -SHARED}
        along = {region: c for region, c in where.items() if c > SHARED}
        if against and len(against) < len(where):
            line += f"{'' if cosine < -SHARED else ', but they work against each other'}{_most(against)}"
        elif along and len(along) < len(where):
            line += f"{'' if cosine > SHARED else ', but they share a direction'}{_most(along)}"
        yield f"{line}."
    if len(pairs) > _PAIRS:
        yield f"The other {len(pairs) - _PAIRS} pairs overlap less."


def _do(cosine: float) -> str:
    if cosine > SAME:
        return "are nearly the same LoRA"
    if cosine > SHARED:
        return "share a direction"
    if cosine < -SHARED:
        return "work against each other"
    return "hardly touch each other"


def _most(regions: dict[str, float]) -> str:
    region = max(regions, key=lambda region: abs(regions[region]))
    others = "" if len(regions) == 1 else ", most"
    return f"{others} in {region} ({regions[region]:+.2f})"


def _sizes(survey: Survey) -> Iterator[str]:
    names, sizes = survey.report.inputs, survey.energies().sum(0).sqrt().tolist()
    heard = [i for i, size in enumerate(sizes) if size > 0]
    for i in range(len(names)):
        if i not in heard:
            yield f"{names[i]} changes nothing."
    if len(heard) > 1:
        low, high = min(heard, key=lambda i: sizes[i]), max(heard, key=lambda i: sizes[i])
        if sizes[high] >= _LOUDER * sizes[low]:
            yield (
                f"{names[high]} is {sizes[high] / sizes[low]:.1f} times as large as {names[low]}: at these weights it "
                "drowns that one out, unless it needs to be that loud."
            )


def _homes(survey: Survey) -> Iterator[str]:
    energies = survey.energies()
    total = energies.sum(0)
    regions = _regions(survey)
    at = {region: [part.region == region for part in survey.parts] for region in regions}
    for i, name in enumerate(survey.report.inputs):
        for region in (FIRST, MIDDLE, LAST, TEXT):
            if region in at and total[i] > 0:
                share = float(energies[torch.tensor(at[region]), i].sum() / total[i])
                if share > _HOME and len(regions) > 1:
                    yield f"{name} acts mostly in {region} ({share:.0%} of its energy)."


def _ranks(survey: Survey) -> Iterator[str]:
    kept = survey.kept()
    what = "the sum's" if len(survey.report.inputs) > 1 else "its"
    enough, whole = survey.rank_for(0.95), survey.rank_for(1 - 1e-9)
    if enough == whole:
        yield f"It takes rank {whole} to keep 95% of {what} energy, and that keeps all of it."
    else:
        yield f"Rank {enough} keeps {_percent(kept[enough - 1])} of {what} energy; all of it needs rank {whole}."


def _origins(survey: Survey) -> Iterator[str]:
    report, mixed = survey.report, survey.report.mixed_clusters()
    if len(report.inputs) < 2 or mixed is None:
        return
    low, high = report.ranks_out
    rank, best = f"rank {low} to {high}", ""
    if low == high:
        rank = f"rank {low}"
        best = f" of it, where no merge can keep more than {_percent(survey.kept()[: low].max())}"
    yield (
        f"LEGO at {rank} keeps {_percent(survey.merged())}{best}; {mixed:.0%} of its units blend several LoRAs, the "
        "others come from one."
    )


def _percent(share: float | torch.Tensor) -> str:
    """Whole numbers, but never 100% of what is not all."""
    share = float(share)
    return f"{share:.0%}" if share >= 1 - 1e-9 or share < 0.995 else f"{int(share * 1000) / 10:.1f}%"


def _regions(survey: Survey) -> dict[str, list[str]]:
    regions: dict[str, list[str]] = {}
    for part in survey.parts:
        regions.setdefault(part.region, []).extend(part.layers)
    return regions
