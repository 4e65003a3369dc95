"""A survey in plain sentences.

Where they draw a line: two LoRAs share a direction above a cosine of `report.SHARED`, work against each other below its
negative, and are nearly the same above `report.SAME`, as in a merge's report; from `_LITTLE` on it is called a little.
One is much larger than another from `_LOUDER` times its norm on, and at home in a stretch of the model that holds more
than `_HOME` of its energy. A rank is said to do from 95% of the sum's energy on.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from ..layers.blocks import FIRST, LAST, MIDDLE, TEXT
from ..merge.report import SAME, SHARED
from .survey import Survey

_LITTLE = 0.1
_LONGEST = 40  # characters of a name
_LOUDER = 2.0
_HOME = 0.5
_TOLD = 3  # pairs, or LoRAs, told of one by one


def title(survey: Survey) -> str:
    """What to call the report."""
    *some, last = survey.report.inputs
    names = f"{', '.join(some)} and {last}" if some else last
    return f"LoRA report: {names if len(some) < 4 else f'{len(some) + 1} LoRAs'}"


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
    if len(pairs) > 1 and strongest(pairs[0]) < _LITTLE:
        yield (
            f"The {len(names)} LoRAs hardly touch each other: every cosine is within {strongest(pairs[0]):.2f} of 0, "
            "over the whole model and in each stretch of it."
        )
        return
    for i, j in pairs[:_TOLD]:
        cosine = overall[i][j]
        where = {region: table[i][j] for region, table in local.items() if len(local) > 1}
        line = f"{_called(names[i])} and {_called(names[j])} {_do(cosine)} (cosine {signed(cosine)})"
        against = {region: c for region, c in where.items() if c < -SHARED}
        along = {region: c for region, c in where.items() if c > SHARED}
        but: list[str] = []
        for do, there, same in (
            ("work against each other", against, cosine < -SHARED),
            ("share a direction", along, cosine > SHARED),
        ):
            if there and len(there) < len(where):
                if same:
                    line += _most(there)
                else:
                    but.append(f"{do}{_most(there)}")
        if but:
            line += f", but they {' and '.join(but)}"
        yield f"{line}."
    if len(pairs) > _TOLD:
        yield f"The other {len(pairs) - _TOLD} pairs overlap less."


def _called(name: str) -> str:
    """A name short enough for a sentence."""
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST // 2]}..{name[-_LONGEST // 2 :]}"


def _do(cosine: float) -> str:
    if cosine > SAME:
        return "are nearly the same LoRA"
    if cosine > SHARED:
        return "share a direction"
    if cosine < -SHARED:
        return "work against each other"
    if abs(cosine) >= _LITTLE:
        return "overlap a little" if cosine > 0 else "work against each other a little"
    return "hardly touch each other"


def _most(regions: dict[str, float]) -> str:
    region = max(regions, key=lambda region: abs(regions[region]))
    others = "" if len(regions) == 1 else ", most"
    return f"{others} in {region} ({signed(regions[region])})"


def _sizes(survey: Survey) -> Iterator[str]:
    names, sizes = survey.report.inputs, survey.energies().sum(0).sqrt().tolist()
    heard = [i for i, size in enumerate(sizes) if size > 0]
    for i in range(len(names)):
        if i not in heard:
            yield f"{_called(names[i])} changes nothing."
    if len(heard) > 1:
        low, high = min(heard, key=lambda i: sizes[i]), max(heard, key=lambda i: sizes[i])
        if sizes[high] >= _LOUDER * sizes[low]:
            yield (
                f"{_called(names[high])} is {sizes[high] / sizes[low]:.1f} times as large as {_called(names[low])}, at "
                "these weights."
            )


def _homes(survey: Survey) -> Iterator[str]:
    energies = survey.energies()
    names, total = survey.report.inputs, energies.sum(0)
    for region in (FIRST, MIDDLE, LAST, TEXT):
        at = torch.tensor([part.region == region for part in survey.parts])
        shares = (energies[at].sum(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).tolist()
        home = [i for i, share in enumerate(shares) if share > _HOME]
        if not home or at.all():
            continue
        if len(home) > _TOLD:
            yield f"{len(home)} of the {len(names)} LoRAs act mostly in {region}."
            continue
        for i in home:
            yield f"{_called(names[i])} acts mostly in {region} ({shares[i]:.0%} of its energy)."


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
        best = f" of it, where no merge can keep more than {_percent(survey.kept()[:low].max())}"
    yield (
        f"LEGO at {rank} keeps {_percent(survey.merged())}{best}; {mixed:.0%} of its units blend several LoRAs, the "
        "others come from one."
    )


def signed(cosine: float) -> str:
    """To two digits; nothing has no sign."""
    return f"{cosine:+.2f}" if abs(cosine) >= 0.005 else "0.00"


def _percent(share: float | torch.Tensor) -> str:
    """Whole numbers, but never 100% of what is not all."""
    share = float(share)
    return f"{share:.0%}" if share >= 1 - 1e-9 or share < 0.995 else f"{int(share * 1000) / 10:.1f}%"


def _regions(survey: Survey) -> dict[str, list[str]]:
    regions: dict[str, list[str]] = {}
    for part in survey.parts:
        regions.setdefault(part.region, []).extend(part.layers)
    return regions
