"""Summary of a survey in plain sentences.

Thresholds: two LoRAs share a direction above a cosine of `report.SHARED`, work against each other below its negative,
and are nearly the same above `report.SAME`, as in a merge report; from `_LITTLE` on they do so a little. One LoRA is
called larger than another from `_LARGER` times its norm on. It acts mostly in a section of the model that holds more
than `_MOSTLY` of its energy. A rank is called sufficient at 95 % of the sum's energy.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import torch

from ..layers.blocks import FIRST, LAST, MIDDLE, TEXT
from ..merge.report import SAME, SHARED
from .survey import Survey

_LITTLE = 0.1
_LARGER = 2.0
_MOSTLY = 0.5
_NAME_LENGTH = 40  # characters of a name, at most
_NAMED = 3  # pairs, or LoRAs, that get a sentence each


def report_title(survey: Survey) -> str:
    """Return a title with the LoRAs' names, or their number if there are more than four."""
    *others, last = survey.report.inputs
    names = f"{', '.join(others)} and {last}" if others else last
    return f"LoRA report: {names if len(others) < 4 else f'{len(others) + 1} LoRAs'}"


def summary_lines(survey: Survey) -> list[str]:
    """Summarise a survey in sentences, the most important first."""
    return [
        *_overlap_sentences(survey),
        *_size_sentences(survey),
        *_section_sentences(survey),
        *_rank_sentences(survey),
        *_lego_sentences(survey),
    ]


def format_cosine(cosine: float) -> str:
    """Format a cosine with a sign and two digits; zero has no sign."""
    return f"{cosine:+.2f}" if abs(cosine) >= 0.005 else "0.00"


def _overlap_sentences(survey: Survey) -> Iterator[str]:
    names = survey.report.inputs
    by_section = {section: survey.report_of(layers).overlap() for section, layers in _layers_by_section(survey).items()}
    overall = survey.report.overlap()

    def strongest(pair: tuple[int, int]) -> float:
        i, j = pair
        return max(abs(table[i][j]) for table in (overall, *by_section.values()))

    pairs = sorted(combinations(range(len(names)), 2), key=lambda pair: (-strongest(pair), pair))
    if len(pairs) > 1 and strongest(pairs[0]) < _LITTLE:
        yield (
            f"The {len(names)} LoRAs hardly touch each other: every cosine is within {strongest(pairs[0]):.2f} of 0, "
            "over the whole model and in each section of it."
        )
        return
    for i, j in pairs[:_NAMED]:
        sections = {section: table[i][j] for section, table in by_section.items() if len(by_section) > 1}
        yield f"{_short_name(names[i])} and {_short_name(names[j])} {_pair_sentence(overall[i][j], sections)}."
    if len(pairs) > _NAMED:
        yield f"The other {len(pairs) - _NAMED} pairs overlap less."


def _pair_sentence(overall: float, sections: dict[str, float]) -> str:
    """Describe the cosine of a pair over the whole model and, where they differ from it, in the sections."""
    text = f"{_relation(overall)} (cosine {format_cosine(overall)})"
    exceptions: list[str] = []
    for relation, strong, is_overall in (
        ("work against each other", {r: c for r, c in sections.items() if c < -SHARED}, overall < -SHARED),
        ("share a direction", {r: c for r, c in sections.items() if c > SHARED}, overall > SHARED),
    ):
        if strong and len(strong) < len(sections):
            if is_overall:
                text += _strongest_section(strong)
            else:
                exceptions.append(f"{relation}{_strongest_section(strong)}")
    return f"{text}, but they {' and '.join(exceptions)}" if exceptions else text


def _short_name(name: str) -> str:
    return name if len(name) <= _NAME_LENGTH else f"{name[: _NAME_LENGTH // 2]}..{name[-_NAME_LENGTH // 2 :]}"


def _relation(cosine: float) -> str:
    if cosine > SAME:
        return "are nearly the same LoRA"
    if cosine > SHARED:
        return "share a direction"
    if cosine < -SHARED:
        return "work against each other"
    if abs(cosine) >= _LITTLE:
        return "overlap a little" if cosine > 0 else "work against each other a little"
    return "hardly touch each other"


def _strongest_section(cosines: dict[str, float]) -> str:
    section = max(cosines, key=lambda section: abs(cosines[section]))
    most = "" if len(cosines) == 1 else ", most"
    return f"{most} in {section} ({format_cosine(cosines[section])})"


def _size_sentences(survey: Survey) -> Iterator[str]:
    names, sizes = survey.report.inputs, survey.energies().sum(0).sqrt().tolist()
    nonzero = [i for i, size in enumerate(sizes) if size > 0]
    for i in range(len(names)):
        if i not in nonzero:
            yield f"{_short_name(names[i])} changes nothing."
    if len(nonzero) > 1:
        low, high = min(nonzero, key=lambda i: sizes[i]), max(nonzero, key=lambda i: sizes[i])
        if sizes[high] >= _LARGER * sizes[low]:
            yield (
                f"{_short_name(names[high])} is {sizes[high] / sizes[low]:.1f} times as large as "
                f"{_short_name(names[low])}, at these weights."
            )


def _section_sentences(survey: Survey) -> Iterator[str]:
    energies = survey.energies()
    names, total = survey.report.inputs, energies.sum(0)
    for section in (FIRST, MIDDLE, LAST, TEXT):
        inside = torch.tensor([block.section == section for block in survey.blocks])
        shares = (energies[inside].sum(0) / total.clamp_min(torch.finfo(total.dtype).tiny)).tolist()
        mostly_here = [i for i, share in enumerate(shares) if share > _MOSTLY]
        if not mostly_here or inside.all():
            continue
        if len(mostly_here) > _NAMED:
            yield f"{len(mostly_here)} of the {len(names)} LoRAs act mostly in {section}."
            continue
        for i in mostly_here:
            yield f"{_short_name(names[i])} acts mostly in {section} ({shares[i]:.0%} of its energy)."


def _rank_sentences(survey: Survey) -> Iterator[str]:
    whose = "the sum's" if len(survey.report.inputs) > 1 else "its"
    sufficient, full = survey.rank_for(0.95), survey.rank_for(1 - 1e-9)
    if sufficient == full:
        yield f"It takes rank {full} to keep 95% of {whose} energy, and that keeps all of it."
    else:
        kept = _percent(survey.energy_by_rank()[sufficient - 1])
        yield f"Rank {sufficient} keeps {kept} of {whose} energy; all of it needs rank {full}."


def _lego_sentences(survey: Survey) -> Iterator[str]:
    report, mixed = survey.report, survey.report.mixed_clusters()
    if len(report.inputs) < 2 or mixed is None:
        return
    low, high = report.ranks_out
    rank, best = f"rank {low} to {high}", ""
    if low == high:
        rank = f"rank {low}"
        best = f" of it, where no merge can keep more than {_percent(survey.energy_by_rank()[:low].max())}"
    yield (
        f"LEGO at {rank} keeps {_percent(survey.lego_energy())}{best}; {mixed:.0%} of its units blend several LoRAs, "
        "the others come from one."
    )


def _percent(share: float | torch.Tensor) -> str:
    """Format a share in whole percent, but as less than 100% unless it is all."""
    share = float(share)
    return f"{share:.0%}" if share >= 1 - 1e-9 or share < 0.995 else f"{int(share * 1000) / 10:.1f}%"


def _layers_by_section(survey: Survey) -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    for block in survey.blocks:
        sections.setdefault(block.section, []).extend(block.layers)
    return sections
