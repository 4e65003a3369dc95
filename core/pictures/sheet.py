"""A labelled sheet of pictures: a grid with names along both sides, legible at any size of picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .charts import _INK, _PALE, _PAPER

if TYPE_CHECKING:
    from PIL.Image import Image

_SMALL = 192  # pixels: smaller pictures are enlarged, by a whole number
_LONGEST = 8192  # pixels of the sheet; larger ones are more than a page shows
_LINES = 5  # of a name; what is left over is cut


def sheet(
    pictures: Sequence[Sequence[Tensor]],
    columns: Sequence[str],
    rows: Sequence[str],
    x_title: str = "",
    y_title: str = "",
) -> Image:
    """Pictures in rows and columns.

    Args:
        pictures: ``(H, W, 3)`` in 0 .. 1, all of one size, row by row.
        columns, rows: Names. Long ones are broken into lines, and cut after the fifth. Where all are empty, no room is
            left for them.
        x_title: What the columns differ in. y_title: What the rows do.
    """
    from PIL import Image, ImageDraw, ImageFont

    cell_w, cell_h = _cell_size(pictures)
    font: Any = ImageFont.load_default(min(max(cell_w // 16, 14), 44))
    draw = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    gap, line = max(4, cell_w // 64), round(font.size * 1.25)
    margin = 3 * gap

    def broken(text: str, width: int) -> list[str]:
        return _broken(text, width, lambda part: draw.textlength(part, font=font))

    widest = max((draw.textlength(name, font=font) for name in (*rows, y_title)), default=0)
    side = int(min(widest, max(cell_w * 0.6, 8 * font.size))) + 2
    above = [broken(name, cell_w) for name in columns]
    beside = [broken(name, side) for name in rows]
    x_lines, y_lines = broken(x_title, cell_w * len(columns) + gap * (len(columns) - 1)), broken(y_title, side)

    left = margin + (side + 2 * gap if any(rows) or y_title else 0)
    names = line * max(map(len, above))
    heads = names + line * len(x_lines) + (gap if names and x_lines else 0)
    head = max(heads, line * len(y_lines))
    top = margin + (head + gap if head else 0)
    height = max([cell_h, *(line * len(lines) for lines in beside)])
    width = left + len(columns) * (cell_w + gap) - gap + margin
    picture = Image.new("RGB", (width, top + len(rows) * (height + gap) - gap + margin), _PAPER)
    draw = ImageDraw.Draw(picture)

    def write(lines: Sequence[str], x: float, y: float, anchor: str, ink: tuple[int, int, int]) -> None:
        for i, text in enumerate(lines):
            draw.text((x, y + line * (i + 0.5)), text, fill=ink, font=font, anchor=anchor)

    bottom = top - gap
    write(x_lines, (left + width - margin) / 2, bottom - heads, "mm", _PALE)
    write(y_lines, left - 2 * gap, bottom - line * len(y_lines), "rm", _PALE)
    for j, lines in enumerate(above):
        write(lines, left + j * (cell_w + gap) + cell_w / 2, bottom - line * len(lines), "mm", _INK)
    for i, (row, lines) in enumerate(zip(pictures, beside, strict=True)):
        y = top + i * (height + gap)
        write(lines, left - 2 * gap, y + (height - line * len(lines)) / 2, "rm", _INK)
        for j, pixels in enumerate(row):
            picture.paste(_resized(pixels, cell_w, cell_h), (left + j * (cell_w + gap), y + (height - cell_h) // 2))
    return picture


def _cell_size(pictures: Sequence[Sequence[Tensor]]) -> tuple[int, int]:
    """Width and height of a picture on the sheet."""
    height, width = pictures[0][0].shape[:2]
    times = max(1, -(-_SMALL // max(height, width)))
    share = min(1.0, _LONGEST / (times * max(width * len(pictures[0]), height * len(pictures))))
    return max(1, int(width * times * share)), max(1, int(height * times * share))


def _resized(pixels: Tensor, width: int, height: int) -> Image:
    from PIL import Image

    picture = Image.fromarray((pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu().numpy())
    if picture.size == (width, height):
        return picture
    enlarged = width >= picture.width
    return picture.resize((width, height), Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS)


def _broken(text: str, width: float, length: Any) -> list[str]:
    """A text in lines no longer than `width`, broken between words, and inside of words that are longer than a line."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and length(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        word = f"{line} {word}" if line else word
        while length(word) > width and len(word) > 1:
            fits = next((n for n in range(len(word) - 1, 1, -1) if length(word[:n]) <= width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if len(lines) > _LINES:
        last = lines[_LINES - 1]
        while last and length(f"{last}..") > width:
            last = last[:-1]
        lines = [*lines[: _LINES - 1], f"{last.rstrip()}.."]
    return lines
