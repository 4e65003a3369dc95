"""Charts as images: lines over training steps or sampling passes, and heat maps."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import GRID, PALE, SERIES, Canvas, heat, ink_on

if TYPE_CHECKING:
    from PIL.Image import Image

_TOP, _BOTTOM = 44, 34  # height of the title above a chart, and of the labels below it
_CELL_WIDTH = 96
_CHARACTER = 7  # width that a character of text takes at most, on average
_LEGEND_ROW = 32


def curves(series: Mapping[str, Sequence[float]], title: str = "", *, width: int = 640, height: int = 360) -> Image:
    """Draw values over training steps, each series on a scale of its own; the first is drawn over the others.

    Args:
        series: Name -> values. Values that are not finite are left out of the line. The legend holds the first and the
            last finite value.
        title: Text above the chart.
        width: Width of the image in pixels.
        height: Height of the image in pixels.
    """
    canvas = _titled(title)
    left, right, bottom = 20, width - 150, height - _BOTTOM
    steps = max((len(values) for values in series.values()), default=0)
    canvas.axes(left, _TOP, right - left, bottom - _TOP, (), [(i / 4, "") for i in range(5)])
    for n, (name, values) in reversed([*enumerate(series.items())]):
        finite = [value for value in values if math.isfinite(value)]
        low, high = min(finite, default=0.0), max(finite, default=0.0)
        points = [
            (
                left + (right - left) * i / max(1, steps - 1),
                bottom - (bottom - _TOP) * ((value - low) / (high - low) if high > low else 0.5),
            )
            for i, value in enumerate(values)
            if math.isfinite(value)
        ]
        colour, y = SERIES[n % len(SERIES)], _TOP + 46 * n
        canvas.line(points, colour, 1 if n else 3)
        canvas.text(right + 14, y, canvas.fitted(name, 132), colour)
        if finite:
            canvas.text(right + 14, y + 15, f"{finite[0]:.4g} to {finite[-1]:.4g}")
        else:
            canvas.text(right + 14, y + 15, "no values", PALE)
    _span(canvas, left, right, bottom, "step", steps)
    return canvas.finish(width, height)


def lines(
    series: Sequence[tuple[str, Sequence[float]]],
    title: str,
    *,
    high: float = 1.0,
    width: int = 660,
    height: int = 220,
) -> Image:
    """Draw values over the passes of a model, all series on one scale that starts at 0, or at the lowest value.

    The legend holds the first and the last value of each series. After six series colours repeat, dashed.

    Args:
        series: Names with their values, finite and equally many.
        title: Text above the chart.
        high: Smallest upper end of the scale; larger values extend it.
        width: Width of the image in pixels.
        height: Height of the image in pixels; larger where the legend needs it.
    """
    passes = max((len(values) for _, values in series), default=0)
    everything = [value for _, values in series for value in values]
    low, high = min([0.0, *everything]), max([high, *everything])
    high = high if high > low else low + 1.0
    canvas, height = _titled(title), max(height, _TOP + _LEGEND_ROW * len(series) + _BOTTOM)
    left, right, bottom = 52, width - 196, height - _BOTTOM
    ticks = [(i / 4, f"{low + (high - low) * i / 4:.2f}") for i in range(5)]
    canvas.axes(left, _TOP, right - left, bottom - _TOP, (), ticks, size=12)
    for n, (name, values) in enumerate(series):
        colour, dashed = SERIES[n % len(SERIES)], n >= len(SERIES)
        points = [
            (left + (right - left) * i / max(1, passes - 1), bottom - (bottom - _TOP) * (value - low) / (high - low))
            for i, value in enumerate(values)
        ]
        canvas.line(points, colour, 2, dashed=dashed)
        y = _TOP - 8 + _LEGEND_ROW * n
        canvas.line([(right + 14, y + 8), (right + 34, y + 8)], colour, 2, dashed=dashed)
        canvas.text(right + 40, y, canvas.fitted(name, 150))
        ends = f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f}"
        canvas.text(right + 40, y + 14, ends, PALE)
    _span(canvas, left, right, bottom, "pass", passes)
    return canvas.finish(width, height)


def heat_map(
    values: Tensor | Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str = "",
    *,
    high: float | None = None,
) -> Image:
    """Draw a table as colours from 0 (dark) to `high` (bright), with every value written into its cell.

    Args:
        values: Table ``(rows, columns)``, not negative.
        row_names: Names of the rows, e.g. blocks.
        column_names: Names of the columns, e.g. LoRAs.
        title: Text above the map.
        high: Value of the brightest colour; default the largest value, at least 1.
    """
    table = torch.as_tensor(values, dtype=torch.float32)
    rows, columns = table.shape
    finite = table[torch.isfinite(table)]
    high = high or max(1.0, float(finite.max()) if finite.numel() else 1.0)
    cell_height, top = 22 if rows <= 60 else 14, 72
    left = 14 + _CHARACTER * min(34, max((len(name) for name in row_names), default=1))
    canvas, height = _titled(title), max(cell_height * rows, 60)
    for j, name in enumerate(column_names):
        canvas.text(left + _CELL_WIDTH * (j + 0.5), top - 14, canvas.fitted(name, _CELL_WIDTH - 6), anchor="mm")
    for i, name in enumerate(row_names):
        y = top + cell_height * i
        canvas.text(left - 6, y + cell_height / 2 - 1, canvas.fitted(name, left - 10), anchor="rm")
        for j in range(columns):
            value = float(table[i, j])
            fill = heat(value / high) if math.isfinite(value) else GRID
            x = left + _CELL_WIDTH * j
            canvas.box(x, y, _CELL_WIDTH - 1, cell_height - 1, fill)
            if cell_height > 16:
                x, y_middle = x + _CELL_WIDTH / 2 - 1, y + cell_height / 2 - 1
                canvas.text(x, y_middle, f"{value:.2f}", ink_on(fill), anchor="mm")
    right = left + _CELL_WIDTH * columns
    _heat_scale(canvas, right + 14, top, height, high)
    return canvas.finish(max(right + 70, 320), top + height + 20)


def stacked(images: Sequence[Image]) -> Image:
    """Put images one below the other, on white."""
    canvas, top = Canvas(density=1), 0
    for image in images:
        canvas.image(0, top, image)
        top += image.height
    return canvas.finish(max(image.width for image in images), top)


def png(image: Image) -> bytes:
    """Encode an image as a PNG file with a palette of 256 colours: enough for a figure, and small."""
    from PIL import Image

    # the default method merges rare colours, such as those of a legend or of the ends of a colour scale
    palette = image.quantize(256, method=Image.Quantize.MAXCOVERAGE, kmeans=3, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    palette.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _titled(title: str) -> Canvas:
    canvas = Canvas(density=1)
    canvas.text(14, 12, title, size=15)
    return canvas


def _span(canvas: Canvas, left: float, right: float, bottom: float, unit: str, count: int) -> None:
    """Number the first and the last value below a chart."""
    canvas.text(left, bottom + 8, f"{unit} 1", PALE)
    if count > 1:
        canvas.text(right, bottom + 8, f"{unit} {count}", PALE, anchor="ra")


def _heat_scale(canvas: Canvas, x: float, y: float, height: int, high: float) -> None:
    for i in range(height):
        canvas.box(x, y + i, 13, 1, heat(1 - i / height))
    canvas.text(x + 17, y - 4, f"{high:.2g}", PALE)
    canvas.text(x + 17, y + height - 10, "0", PALE)
