"""The picture of a survey: a table of blocks (overlap, energy, origins), curves over the rank, maps of units."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..layers.blocks import short_names
from ..pictures.canvas import GRID, INK, PALE, PAPER, SERIES, Canvas, Colour, blend, ink_on
from .summary import format_cosine, report_title, summary_lines
from .survey import Survey, UnitMap

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH, _MARGIN = 1060, 28
_INNER = _WIDTH - 2 * _MARGIN
_NAMES, _ORIGINS, _GAP = 210, 190, 34  # widths in the table: block names, origins; between its groups
_NOTE = 150  # width of the text above a group, at least
_CHART, _AXIS, _MAP = 190, 44, 200  # height of a chart, width of the labels left of it; height of a map
_COLD: Colour = (33, 102, 172)
_WARM: Colour = (178, 24, 43)
_EMPTY: Colour = (244, 244, 247)
_OTHERS: Colour = (150, 150, 158)
_SUM = INK
_PAIRS, _LORAS = 6, 6  # columns in the table, at most
_FINDINGS = 8  # the most severe ones are shown
_LEVELS: dict[str, Colour] = {"fault": (201, 48, 44), "warning": (217, 154, 0), "note": (46, 139, 87)}


def draw_survey(survey: Survey) -> Image:
    """Draw a survey with its findings as one picture, 1590 pixels wide.

    With many LoRAs the table shows the six largest and the six pairs that overlap most; curves and maps show all, in
    grey from the seventh on.
    """
    canvas = Canvas()
    y = _draw_summary(canvas, survey)
    y = _draw_legend(canvas, survey, y + 12)
    y = _draw_table(canvas, survey, y + 62)
    half = (_INNER - 60) / 2
    _draw_spectrum(canvas, survey, _MARGIN + _AXIS, y + 74, half - _AXIS)
    _draw_energy_by_rank(canvas, survey, _MARGIN + half + 60 + _AXIS, y + 74, half - _AXIS)
    y += 74 + _CHART
    maps = [unit_map for unit_map in survey.unit_maps if len(unit_map.points)][:3]  # sections of the model come first
    width = (_INNER - 2 * 24) / 3
    for i, unit_map in enumerate(maps):
        _draw_map(canvas, unit_map, _MARGIN + i * (width + 24), y + 74, width)
    return canvas.finish(_WIDTH, y + (74 + _MAP + 48 if maps else 54))


def _colour(adapter: int) -> Colour:
    return SERIES[adapter] if adapter < len(SERIES) else _OTHERS


def _draw_summary(canvas: Canvas, survey: Survey) -> float:
    """Write title, findings with the colour of their level, and summary; return where they end."""
    canvas.text(_MARGIN, 20, canvas.fitted(report_title(survey), _INNER, 19, keep="start"), size=19)
    y = 56
    findings = [(finding.text + ".", _LEVELS[finding.level]) for finding in survey.report.findings]
    for sentence, colour in (*findings[:_FINDINGS], *((sentence, PALE) for sentence in summary_lines(survey))):
        canvas.dot(_MARGIN + 3, y + 8, 2 if colour is PALE else 4, colour)
        for line in canvas.wrapped(sentence, _INNER - 14, 12.5):
            canvas.text(_MARGIN + 14, y, line, size=12.5)
            y += 17
    return y + 2


def _draw_legend(canvas: Canvas, survey: Survey, top: float) -> float:
    """Name the LoRAs and their colours in two columns, and return where the legend ends."""
    names, weights = survey.report.inputs, survey.report.weights
    shown, width = min(len(names), len(SERIES) + 1), _INNER / 2
    for i in range(shown):
        x, y = _MARGIN + width * (i % 2), top + 20 * (i // 2)
        canvas.box(x, y + 2, 12, 12, _colour(i))
        text = f"{i + 1}   {names[i]}, weight {weights[i]:g}"
        if i == len(SERIES) and len(names) > shown:
            text = f"{i + 1} to {len(names)}   all others"
        canvas.text(x + 20, y + 1, canvas.fitted(text, width - 40, keep="start"))
    return top + 20 * math.ceil(shown / 2)


def _draw_table(canvas: Canvas, survey: Survey, top: float) -> float:
    """Draw the table of blocks, and return where it ends."""
    row = 19.0 if len(survey.blocks) <= 40 else 12.0
    pairs, loras = _shown_pairs(survey), _shown_loras(survey)
    groups = [len(pairs), len(loras)] if pairs else [len(loras)]
    origins = _ORIGINS if len(survey.report.inputs) > 1 else 0
    room = _INNER - _NAMES - origins - _GAP * (len(groups) - 1 + (origins > 0))
    cell = min(74.0, room / sum(groups))
    for i, name in enumerate(short_names(survey.blocks)):
        name = canvas.fitted(name, _NAMES - 8, row * 0.6)
        canvas.text(_MARGIN + _NAMES - 8, top + row * (i + 0.5), name, anchor="rm", size=row * 0.6)
    x = _MARGIN + _NAMES
    if pairs:
        _heading(canvas, x, top, "overlap", "cosine: red along, blue against")
        _draw_overlap(canvas, survey, pairs, x, top, cell, row)
        x += max(cell * len(pairs), _NOTE) + _GAP
    _heading(canvas, x, top, "energy", "share of each LoRA's energy")
    _draw_energy(canvas, survey, loras, x, top, cell, row)
    x += max(cell * len(loras), _NOTE) + _GAP
    if origins:
        _heading(canvas, x, top, "LEGO's units come from", f"rank {survey.rank}; pale: units that blend several")
        _draw_origins(canvas, survey, x, top, _WIDTH - _MARGIN - x, row)
    return top + row * len(survey.blocks)


def _shown_pairs(survey: Survey) -> list[tuple[int, int]]:
    return sorted(survey.pairs()[:_PAIRS])


def _shown_loras(survey: Survey) -> list[int]:
    sizes = survey.energies().sum(0).tolist()
    return sorted(sorted(range(len(sizes)), key=lambda i: (-sizes[i], i))[:_LORAS])


def _heading(canvas: Canvas, x: float, top: float, name: str, note: str) -> None:
    canvas.text(x, top - 52, name, size=14)
    canvas.text(x, top - 34, note, PALE, size=10.5)


def _draw_overlap(
    canvas: Canvas, survey: Survey, pairs: Sequence[tuple[int, int]], x: float, top: float, cell: float, row: float
) -> None:
    for j, (a, b) in enumerate(pairs):
        canvas.text(x + cell * (j + 0.5), top - 9, f"{a + 1} · {b + 1}", anchor="mm", size=11)
    for i, block in enumerate(survey.blocks):
        report = survey.report_of(block.layers)
        overlap = report.overlap()
        for j, (a, b) in enumerate(pairs):
            both = any(a in module.adapters and b in module.adapters for module in report.modules)
            cosine = overlap[a][b]
            fill = blend(PAPER, _WARM if cosine > 0 else _COLD, abs(cosine) ** 0.7)
            fill = blend(_EMPTY, fill, min(1.0, 20 * abs(cosine))) if both else PAPER
            _draw_cell(canvas, x + cell * j, top + row * i, cell, row, fill, format_cosine(cosine) if both else "-")


def _draw_energy(
    canvas: Canvas, survey: Survey, loras: Sequence[int], x: float, top: float, cell: float, row: float
) -> None:
    shares = survey.energy_shares()
    highest = max(float(shares.max()), 1e-9)
    for j, adapter in enumerate(loras):
        canvas.text(x + cell * (j + 0.5), top - 9, str(adapter + 1), anchor="mm", size=11)
        for i, share in enumerate(shares[:, adapter].tolist()):
            fill = blend(_EMPTY, _colour(adapter), share / highest)
            _draw_cell(canvas, x + cell * j, top + row * i, cell, row, fill, f"{share:.0%}")


def _draw_cell(canvas: Canvas, x: float, y: float, width: float, height: float, fill: Colour, text: str) -> None:
    canvas.box(x, y, width - 1.5, height - 1.5, fill)
    if height > 16:
        canvas.text(x + width / 2, y + height / 2 - 0.5, text, ink_on(fill), size=10.5, anchor="mm")


def _draw_origins(canvas: Canvas, survey: Survey, x: float, top: float, width: float, row: float) -> None:
    pure, mixed = survey.unit_origins()
    total = (pure + mixed).sum(1)
    for i in range(len(survey.blocks)):
        left = x
        for counts, paleness in ((pure[i], 0.0), (mixed[i], 0.62)):
            for adapter, count in enumerate(counts.tolist()):
                length = width * count / float(total[i]) if total[i] > 0 else 0
                canvas.box(left, top + row * i, length, row - 1.5, blend(_colour(adapter), PAPER, paleness))
                left += length


def _curves(survey: Survey) -> list[int | None]:
    """Return the adapters and, if there are several, ``None`` for their sum."""
    n = len(survey.report.inputs)
    return [*range(n)] if n == 1 else [*range(n), None]


def _largest_rank(survey: Survey) -> int:
    """Return the largest rank at which a curve still changes."""
    ranks = [len(survey.energy_by_rank(i)) for i in range(len(survey.report.inputs))]
    return max(survey.rank_for(1 - 1e-9), *ranks)


def _rank_ticks(largest: int) -> list[tuple[float, str]]:
    steps = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 256, 512, 1024, 10**9)
    step = next(step for step in steps if largest / step <= 10)
    ranks = [1, *(k for k in range(step, largest + 1, step) if k > 1)]
    return [((k - 1) / max(1, largest - 1), str(k)) for k in ranks]


def _draw_spectrum(canvas: Canvas, survey: Survey, x: float, top: float, width: float) -> None:
    """Draw singular values on a logarithmic scale of at most three decades."""
    lines = [(adapter, survey.spectrum(adapter)) for adapter in _curves(survey)]
    largest = _largest_rank(survey)
    high = max(float(values.max()) for _, values in lines) or 1.0
    low = min((float(v) for _, values in lines for v in values if v > 1e-3 * high), default=high)
    ceiling, floor = math.log10(1.15 * high), math.log10(low / 1.15)
    _heading(canvas, x - _AXIS, top, "singular values", "root mean square over the layers, by index")
    decades = range(math.floor(floor), math.ceil(ceiling) + 1)
    marks = [m * 10.0**k for k in decades for m in ((1, 2, 5) if ceiling - floor < 2 else (1,))]
    up = [((math.log10(mark) - floor) / (ceiling - floor), f"{mark:.4g}") for mark in marks]
    up = [(share, label) for share, label in up if 0 <= share <= 1]
    canvas.axes(x, top, width, _CHART, _rank_ticks(largest), up)
    for adapter, values in lines:
        shares = [(math.log10(v) - floor) / (ceiling - floor) if v > 0 else -1.0 for v in values.tolist()]
        _draw_curve(canvas, shares, x, top, width, largest, adapter)


def _draw_energy_by_rank(canvas: Canvas, survey: Survey, x: float, top: float, width: float) -> None:
    largest = _largest_rank(survey)
    several = len(survey.report.inputs) > 1
    note = "by the best LoRA of each rank" + ("; black: the sum, square: LEGO" if several else "")
    _heading(canvas, x - _AXIS, top, "energy kept", note)
    canvas.axes(x, top, width, _CHART, _rank_ticks(largest), [(k / 4, f"{25 * k}%") for k in range(5)])
    for adapter in _curves(survey):
        _draw_curve(canvas, survey.energy_by_rank(adapter).tolist(), x, top, width, largest, adapter)
    low, high = survey.report.ranks_out
    if several and low == high:
        middle = x + width * (low - 1) / max(1, largest - 1)
        y = top + _CHART * (1 - survey.lego_energy())
        for size, fill in ((5, _SUM), (3, PAPER)):
            canvas.box(middle - size, y - size, 2 * size, 2 * size, fill)


def _draw_curve(
    canvas: Canvas, shares: Sequence[float], x: float, top: float, width: float, largest: int, adapter: int | None
) -> None:
    """Draw a line through shares ``0 .. 1`` of the chart's height, one for each rank; negative ones are left out."""
    colour = _SUM if adapter is None else _colour(adapter)
    points = [
        (x + width * k / max(1, largest - 1), top + _CHART * (1 - share))
        for k, share in enumerate(shares[:largest])
        if share >= 0
    ]
    if len(points) > 1:
        canvas.line(points, colour, 2.2 if adapter is None else 1.8)
    if len(points) <= 24:
        for point in points:
            canvas.dot(*point, 3, colour)


def _draw_map(canvas: Canvas, unit_map: UnitMap, x: float, top: float, width: float) -> None:
    canvas.text(x, top - 44, f"units in {unit_map.section}", size=14)
    canvas.text(x, top - 26, "PCA of the units", PALE, size=10.5)
    canvas.text(x, top - 12, canvas.fitted(unit_map.layer, width, 10.5), PALE, size=10.5)
    top += 6
    canvas.box(x, top, width, _MAP, (248, 248, 250))
    points = unit_map.points - unit_map.points.mean(0)
    low, high = points.min(0).values, points.max(0).values
    middle, span = (low + high) / 2, (high - low).clamp_min(1e-30)
    scale = min((width - 40) / float(span[0]), (_MAP - 40) / float(span[1]))
    spread = float((high - low).max()) > 0
    if spread:  # two rules cross at the mean of the units
        right, up = (-middle * scale).tolist()
        canvas.rule(x + width / 2 + right, top, _MAP, GRID, upright=True)
        canvas.rule(x, top + _MAP / 2 - up, width, GRID)
    offsets = ((points - middle) * scale if spread else torch.zeros_like(points)).tolist()
    largest = float(unit_map.sizes.max())
    for i in unit_map.sizes.argsort(descending=True).tolist():
        right, up = offsets[i]
        radius = 2.5 + 7 * math.sqrt(float(unit_map.sizes[i]) / largest)
        canvas.dot(x + width / 2 + right, top + _MAP / 2 - up, radius, _colour(int(unit_map.owner[i])))
