"""The chart of a sweep: a row per candidate, a bar for each of its predicted errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .canvas import GRID, INK, PALE, SERIES, Canvas, Colour, blend

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..recipes.sweep import Candidate, Sweep

_MARGIN, _NAMES, _COLUMN, _GAP, _ROW = 24, 170, 110, 16, 18
_HEAD = 92  # height of the title and the column names
_SHOWN = 6  # LoRAs with a column of their own
_LARGEST = 2.0  # error at which a bar ends: larger ones are cut, their numbers are right


def draw_sweep(swept: Sweep) -> Image:
    """Draw the candidates of a sweep, the best first; those of `Sweep.best` are marked.

    Columns: the predicted loss by which they are ranked, and the errors of `Prediction`. More than six LoRAs share one
    column, which holds the largest of their errors.
    """
    canvas = Canvas()
    columns = _columns(swept)
    best = swept.best()
    left = _MARGIN + _NAMES
    canvas.text(_MARGIN, _MARGIN, f"{len(swept.candidates)} merges of {', '.join(swept.labels)}", size=16)
    canvas.text(_MARGIN, _MARGIN + 24, "predicted errors: 0 is what prompts want; dots: the best, for pictures", PALE)
    for j, name in enumerate(columns):
        x = left + j * (_COLUMN + _GAP)
        canvas.text(x, _HEAD - 20, canvas.fitted(name, _COLUMN, keep="start"), PALE)
    names = list(dict.fromkeys(candidate.label for candidate in swept.candidates))
    for i, candidate in enumerate(swept.candidates):
        y = _HEAD + i * _ROW
        colour = SERIES[names.index(candidate.label) % len(SERIES)]
        if candidate in best:
            canvas.dot(_MARGIN - 10, y + _ROW / 2, 4, colour)
        canvas.text(_MARGIN, y + _ROW / 2, f"{candidate.label} x {candidate.strength:g}", anchor="lm")
        for j, value in enumerate(_values(candidate, len(columns) - 3)):
            _draw_bar(canvas, left + j * (_COLUMN + _GAP), y, value, colour if j == 0 else blend(colour, GRID, 0.4))
    width = left + len(columns) * (_COLUMN + _GAP) - _GAP + _MARGIN
    return canvas.finish(width, _HEAD + len(swept.candidates) * _ROW + _MARGIN)


def _columns(swept: Sweep) -> list[str]:
    alone = list(swept.labels) if len(swept.labels) <= _SHOWN else ["worst LoRA alone"]
    return ["loss", *alone, "joint", "base"]


def _values(candidate: Candidate, alone: int) -> Sequence[float | None]:
    prediction = candidate.prediction
    errors = prediction.alone
    if len(errors) != alone:
        errors = (max((error for error in errors if error is not None), default=None),)
    return [candidate.score, *errors, prediction.joint, prediction.base]


def _draw_bar(canvas: Canvas, x: float, y: float, value: float | None, colour: Colour) -> None:
    room = _COLUMN - 34
    if value is not None:
        length = room * min(value, _LARGEST) / _LARGEST
        canvas.box(x, y + 4, max(1.0, length), _ROW - 8, colour)
    canvas.text(x + _COLUMN, y + _ROW / 2, "-" if value is None else f"{value:.2f}", INK, size=11, anchor="rm")
