"""The picture of a survey: a table of blocks (overlap, energy, origins), curves over the rank, maps of units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..layers.blocks import short_names
from ..pictures.canvas import Colour, Sheet
from ..pictures.charts import _GRID, _INK, _LINES, _PALE, _PAPER
from .findings import sentences, signed, title
from .survey import Survey, UnitMap

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH, _MARGIN = 1060, 28
_LABEL, _BARS, _GAP = 210, 190, 34  # widths: row labels, origins, between the groups of the table
_NOTE = 150  # width of what is written above a group
_COLD, _WARM = (33, 102, 172), (178, 24, 43)
_SUM: Colour = (40, 40, 45)
_OTHERS: Colour = (150, 150, 158)
_PAIRS, _LORAS = 6, 6  # columns at most


def draw_survey(survey: Survey) -> Image:
    """Draw a survey with its summary on one sheet, 1590 pixels wide.

    Of many LoRAs the table shows the six largest and the six pairs that overlap most; curves and maps show all, in grey
    from the seventh on.
    """
    lines = sentences(survey)
    probe = Sheet(10, 10)  # to measure text
    wrapped = [
        (i == 0, line) for text in lines for i, line in enumerate(probe.wrapped(text, _WIDTH - 2 * _MARGIN - 14, 12.5))
    ]
    shown = _shown(survey)
    row = 19.0 if len(survey.parts) <= 40 else 12.0
    legend = 20 * math.ceil(min(len(survey.report.inputs), len(_LINES) + 1) / 2)
    top_legend = 58 + 17 * len(wrapped) + 12
    top_table = top_legend + legend + 62
    top_curves = top_table + row * len(survey.parts) + 74
    top_maps = top_curves + 190 + 74
    maps = _panels(survey.maps)
    sheet = Sheet(_WIDTH, top_maps + (248 if maps else 0) - (0 if maps else 20))

    sheet.text(_MARGIN, 20, _cut(sheet, title(survey), _WIDTH - 2 * _MARGIN, 19), size=19)
    for i, (first, line) in enumerate(wrapped):
        if first:
            sheet.dot(_MARGIN + 3, 56 + 17 * i + 8, 2, _PALE)
        sheet.text(_MARGIN + 14, 56 + 17 * i, line, size=12.5)
    _draw_legend(sheet, survey, top_legend)
    _draw_table(sheet, survey, shown, top_table, row)
    half = (_WIDTH - 2 * _MARGIN - 60) / 2
    _draw_spectrum(sheet, survey, _MARGIN + 44, top_curves, half - 44)
    _draw_kept(sheet, survey, _MARGIN + half + 60 + 44, top_curves, half - 44)
    width = (_WIDTH - 2 * _MARGIN - 2 * 24) / 3
    for i, unit_map in enumerate(maps):
        _draw_map(sheet, survey, unit_map, _MARGIN + i * (width + 24), top_maps, width, 200)
    return sheet.finish()


def _colour(adapter: int) -> Colour:
    return _LINES[adapter] if adapter < len(_LINES) else _OTHERS


def _mixed(a: Colour, b: Colour, share: float) -> Colour:
    r, g, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return r, g, blue


def _cut(sheet: Sheet, text: str, width: float, size: float = 12) -> str:
    """The beginning of a text that is too wide."""
    if sheet.length(text, size) <= width:
        return text
    while len(text) > 1 and sheet.length(f"{text}..", size) > width:
        text = text[: -max(1, len(text) // 50)]
    return f"{text}.."


def _draw_legend(sheet: Sheet, survey: Survey, top: float) -> None:
    names, weights = survey.report.inputs, survey.report.weights
    width = (_WIDTH - 2 * _MARGIN) / 2
    for i in range(min(len(names), len(_LINES) + 1)):
        x, y = _MARGIN + width * (i % 2), top + 20 * (i // 2)
        sheet.box(x, y + 2, 12, 12, _colour(i))
        text = f"{i + 1}   {names[i]}, weight {weights[i]:g}"
        if i == len(_LINES) and len(names) > len(_LINES) + 1:
            text = f"{i + 1} to {len(names)}   all the others"
        sheet.text(x + 20, y + 1, _cut(sheet, text, width - 40))


def _shown(survey: Survey) -> tuple[list[tuple[int, int]], list[int]]:
    """The pairs and the adapters that have a column."""
    n, pairs = len(survey.report.inputs), survey.pairs()
    sizes = survey.energies().sum(0).tolist()
    largest = sorted(range(n), key=lambda i: (-sizes[i], i))
    return sorted(pairs[:_PAIRS]), sorted(largest[:_LORAS])


def _draw_table(
    sheet: Sheet, survey: Survey, shown: tuple[list[tuple[int, int]], list[int]], top: float, row: float
) -> None:
    pairs, loras = shown
    groups = [len(pairs), len(loras)] if pairs else [len(loras)]
    bars = _BARS if len(survey.report.inputs) > 1 else 0
    room = _WIDTH - 2 * _MARGIN - _LABEL - bars - _GAP * (len(groups) - 1 + (bars > 0))
    cell = min(74.0, room / sum(groups))
    for i, name in enumerate(short_names(survey.parts)):
        sheet.text(
            _MARGIN + _LABEL - 8, top + row * (i + 0.5), sheet.fitted(name, _LABEL - 8, row * 0.6), anchor="rm",
            size=row * 0.6,
        )  # fmt: skip
    x = _MARGIN + _LABEL
    if pairs:
        _head(sheet, x, top, "overlap", "cosine: red along, blue against")
        _draw_overlap(sheet, survey, pairs, x, top, cell, row)
        x += max(cell * len(pairs), _NOTE) + _GAP
    _head(sheet, x, top, "energy", "share of each LoRA's own")
    _draw_energy(sheet, survey, loras, x, top, cell, row)
    x += max(cell * len(loras), _NOTE) + _GAP
    if bars:
        _head(sheet, x, top, "LEGO's units come from", f"rank {survey.rank}; pale: units that blend several")
        _draw_origins(sheet, survey, x, top, _WIDTH - _MARGIN - x, row)


def _head(sheet: Sheet, x: float, top: float, name: str, note: str) -> None:
    sheet.text(x, top - 52, name, size=14)
    sheet.text(x, top - 34, note, _PALE, size=10.5)


def _draw_overlap(
    sheet: Sheet, survey: Survey, pairs: Sequence[tuple[int, int]], x: float, top: float, cell: float, row: float
) -> None:
    for j, (a, b) in enumerate(pairs):
        sheet.text(x + cell * (j + 0.5), top - 9, f"{a + 1} · {b + 1}", anchor="mm", size=11)
    for i, part in enumerate(survey.parts):
        report = survey.of(part.layers)
        table = report.overlap()
        for j, (a, b) in enumerate(pairs):
            both = any(a in module.adapters and b in module.adapters for module in report.modules)
            value = table[a][b]
            fill = _mixed(_PAPER, _WARM if value > 0 else _COLD, abs(value) ** 0.7)
            fill = _mixed((244, 244, 247), fill, min(1.0, 20 * abs(value))) if both else _PAPER
            _cell(sheet, x + cell * j, top + row * i, cell, row, fill, signed(value) if both else "-")


def _draw_energy(
    sheet: Sheet, survey: Survey, loras: Sequence[int], x: float, top: float, cell: float, row: float
) -> None:
    shares = survey.shares()
    highest = max(float(shares.max()), 1e-9)
    for j, adapter in enumerate(loras):
        sheet.text(x + cell * (j + 0.5), top - 9, str(adapter + 1), anchor="mm", size=11)
        for i in range(len(survey.parts)):
            share = float(shares[i, adapter])
            fill = _mixed((244, 244, 247), _colour(adapter), share / highest)
            _cell(sheet, x + cell * j, top + row * i, cell, row, fill, f"{share:.0%}")


def _cell(sheet: Sheet, x: float, y: float, width: float, height: float, fill: Colour, text: str) -> None:
    sheet.box(x, y, width - 1.5, height - 1.5, fill)
    if height > 16:
        ink = _INK if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] > 140 else _PAPER
        sheet.text(x + width / 2, y + height / 2 - 0.5, text, ink, size=10.5, anchor="mm")


def _draw_origins(sheet: Sheet, survey: Survey, x: float, top: float, width: float, row: float) -> None:
    pure, mixed = survey.origins()
    total = (pure + mixed).sum(1)
    for i in range(len(survey.parts)):
        at = x
        for counts, pale in ((pure[i], 0.0), (mixed[i], 0.62)):
            for adapter, count in enumerate(counts.tolist()):
                length = width * count / float(total[i]) if total[i] > 0 else 0
                sheet.box(at, top + row * i, length, row - 1.5, _mixed(_colour(adapter), _PAPER, pale))
                at += length


def _curves(survey: Survey) -> list[int | None]:
    """What has a curve: every adapter, and their sum."""
    n = len(survey.report.inputs)
    return [*range(n)] if n == 1 else [*range(n), None]


def _longest(survey: Survey) -> int:
    """The largest rank there is anything to see at."""
    return max(survey.rank_for(1 - 1e-9), *(len(survey.kept(i)) for i in range(len(survey.report.inputs))))


def _ticks(longest: int) -> list[int]:
    step = next(step for step in (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024, 10**9)
                if longest / step <= 10)  # fmt: skip
    return [1, *(k for k in range(step, longest + 1, step) if k > 1)]


def _across(longest: int) -> list[tuple[float, str]]:
    return [((k - 1) / max(1, longest - 1), str(k)) for k in _ticks(longest)]


def _draw_spectrum(sheet: Sheet, survey: Survey, x: float, top: float, width: float) -> None:
    """Singular values on a logarithmic scale of three decades at most."""
    height = 190
    lines = [(adapter, survey.spectrum(adapter)) for adapter in _curves(survey)]
    longest = _longest(survey)
    high = max(float(values.max()) for _, values in lines) or 1.0
    low = min((float(v) for _, values in lines for v in values if v > 1e-3 * high), default=high)
    ceiling, floor = math.log10(1.15 * high), math.log10(low / 1.15)
    _head(sheet, x - 38, top, "singular values", "root mean square over the layers, by their number")
    decades = range(math.floor(floor), math.ceil(ceiling) + 1)
    marks = [m * 10.0**k for k in decades for m in ((1, 2, 5) if ceiling - floor < 2 else (1,))]
    up = [((math.log10(mark) - floor) / (ceiling - floor), f"{mark:.4g}") for mark in marks]
    sheet.axes(x, top, width, height, _across(longest), [(share, label) for share, label in up if 0 <= share <= 1])
    for adapter, values in lines:
        shares = [(math.log10(v) - floor) / (ceiling - floor) if v > 0 else -1.0 for v in values.tolist()]
        _draw_line(sheet, shares, x, top, width, height, longest, adapter)


def _draw_kept(sheet: Sheet, survey: Survey, x: float, top: float, width: float) -> None:
    height = 190
    lines = [(adapter, survey.kept(adapter)) for adapter in _curves(survey)]
    longest = _longest(survey)
    several = len(survey.report.inputs) > 1
    note = "by the best LoRA of each rank" + ("; black: the sum, square: LEGO" if several else "")
    _head(sheet, x - 38, top, "energy kept", note)
    sheet.axes(x, top, width, height, _across(longest), [(k / 4, f"{25 * k}%") for k in range(5)])
    for adapter, values in lines:
        _draw_line(sheet, values.tolist(), x, top, width, height, longest, adapter)
    low, high = survey.report.ranks_out
    if several and low == high:
        at = x + width * (low - 1) / max(1, longest - 1)
        y = top + height * (1 - survey.merged())
        for size, fill in ((5, _SUM), (3, _PAPER)):
            sheet.box(at - size, y - size, 2 * size, 2 * size, fill)


def _draw_line(
    sheet: Sheet, shares: Sequence[float], x: float, top: float, width: float, height: float, longest: int,
    adapter: int | None,
) -> None:  # fmt: skip
    colour = _SUM if adapter is None else _colour(adapter)
    points = [
        (x + width * k / max(1, longest - 1), top + height * (1 - share))
        for k, share in enumerate(shares[:longest])
        if share >= 0
    ]
    if len(points) > 1:
        sheet.line(points, colour, 2.2 if adapter is None else 1.8)
    if len(points) <= 24:
        for at in points:
            sheet.dot(*at, 3, colour)


def _panels(maps: Sequence[UnitMap]) -> list[UnitMap]:
    """Three at most; of the model's blocks first."""
    return [unit_map for unit_map in maps if len(unit_map.points)][:3]


def _draw_map(
    sheet: Sheet, survey: Survey, unit_map: UnitMap, x: float, top: float, width: float, height: float
) -> None:
    how = "PCA of the units" if survey.drawn == "pca" else "t-SNE of the units' directions"
    sheet.text(x, top - 44, f"units in {unit_map.region}", size=14)
    sheet.text(x, top - 26, how, _PALE, size=10.5)
    sheet.text(x, top - 12, sheet.fitted(unit_map.layer, width, 10.5), _PALE, size=10.5)
    sheet.box(x, top + 6, width, height, (248, 248, 250))
    points = unit_map.points - unit_map.points.mean(0)
    low, high = points.min(0).values, points.max(0).values
    middle, span = (low + high) / 2, (high - low).clamp_min(1e-30)
    scale = min((width - 40) / float(span[0]), (height - 40) / float(span[1]))
    place = (points - middle) * scale if float((high - low).max()) > 0 else torch.zeros_like(points)
    if survey.drawn == "pca" and float((high - low).max()) > 0:
        right, up = (-middle * scale).tolist()  # where the mean of the units lies
        for ends in (((right, -height / 2), (right, height / 2)), ((-width / 2, up), (width / 2, up))):
            sheet.line([_at(x, top + 6, width, height, *end) for end in ends], _GRID, 0.7)
    order = unit_map.sizes.argsort(descending=True).tolist()
    largest = float(unit_map.sizes.max())
    for i in order:
        radius = 2.5 + 7 * math.sqrt(float(unit_map.sizes[i]) / largest)
        sheet.dot(
            *_at(x, top + 6, width, height, float(place[i, 0]), float(place[i, 1])), radius,
            _colour(int(unit_map.owner[i])),
        )  # fmt: skip


def _at(x: float, y: float, width: float, height: float, right: float, up: float) -> tuple[float, float]:
    return x + width / 2 + right, y + height / 2 - up
