"""A comparison sheet: generated images in rows and columns, with names along both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .canvas import INK, PALE, Canvas, Colour

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL = 192  # pixels: smaller images are enlarged, by a whole number
_LARGEST = 8192  # pixels of the sheet's longer side
_NAME_LINES = 5


def comparison_sheet(
    images: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    rows: Sequence[str],
    x_title: str = "",
    y_title: str = "",
) -> Image:
    """Lay out images in rows and columns.

    Args:
        images: Images ``(H, W, 3)`` in 0 .. 1, all of one size, row by row.
        columns: Names of the columns. Long names are wrapped, and shortened after five lines. Without any names no room
            is left for them.
        rows: Names of the rows, likewise.
        x_title: What differs from column to column.
        y_title: What differs from row to row.
    """
    cell_w, cell_h = _cell_size(images)
    size = min(max(cell_w // 16, 14), 44)
    gap, line = max(4, cell_w // 64), round(size * 1.25)
    margin = 3 * gap

    canvas = Canvas(density=1)
    widest = max((canvas.text_width(name, size) for name in (*rows, y_title)), default=0)
    side = int(min(widest, max(cell_w * 0.6, 8 * size))) + 2
    left = margin + (side + 2 * gap if any(rows) or y_title else 0)
    width = left + len(columns) * (cell_w + gap) - gap + margin

    def wrapped(text: str, width: float) -> list[str]:
        return canvas.wrapped(text, width, size, most=_NAME_LINES)

    def write(lines: Sequence[str], x: float, y: float, anchor: str, ink: Colour) -> None:
        for i, text in enumerate(lines):
            canvas.text(x, y + line * (i + 0.5), text, ink, size=size, anchor=anchor)

    column_lines = [wrapped(name, cell_w) for name in columns]
    row_lines = [wrapped(name, side) for name in rows]
    x_lines, y_lines = wrapped(x_title, width - margin - left), wrapped(y_title, side)
    names = line * max(map(len, column_lines))
    head = names + line * len(x_lines) + (gap if names and x_lines else 0)
    tallest = max(head, line * len(y_lines))
    top = margin + (tallest + gap if tallest else 0)
    row_height = max([cell_h, *(line * len(lines) for lines in row_lines)])

    bottom = top - gap
    write(x_lines, (left + width - margin) / 2, bottom - head, "mm", PALE)
    write(y_lines, left - 2 * gap, bottom - line * len(y_lines), "rm", PALE)
    for j, lines in enumerate(column_lines):
        write(lines, left + j * (cell_w + gap) + cell_w / 2, bottom - line * len(lines), "mm", INK)
    for i, (row, lines) in enumerate(zip(images, row_lines, strict=True)):
        y = top + i * (row_height + gap)
        write(lines, left - 2 * gap, y + (row_height - line * len(lines)) / 2, "rm", INK)
        for j, pixels in enumerate(row):
            place = left + j * (cell_w + gap), y + (row_height - cell_h) // 2
            canvas.image(*place, _resized(pixels, cell_w, cell_h))
    return canvas.finish(width, top + len(rows) * (row_height + gap) - gap + margin)


def _cell_size(images: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    """Width and height of an image on the sheet, in pixels."""
    height, width = images[0][0].shape[:2]
    times = max(1, -(-_SMALL // max(height, width)))
    share = min(1.0, _LARGEST / (times * max(width * len(images[0]), height * len(images))))
    return max(1, int(width * times * share)), max(1, int(height * times * share))


def _resized(pixels: Tensor, width: int, height: int) -> Image:
    from PIL import Image

    image = Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    if image.size == (width, height):
        return image
    enlarged = width >= image.width
    return image.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)
