"""Pictures of what gates do: curves and heat maps. Drawn with Pillow, which every host has (loaded on use)."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

_INK, _PALE, _GRID, _PAPER = (40, 40, 45), (120, 120, 128), (225, 225, 230), (255, 255, 255)
_LINES = ((31, 119, 180), (214, 102, 0), (44, 140, 60), (190, 40, 60), (120, 90, 180), (110, 80, 60))
# Dark blue, teal, green, yellow: even steps of lightness, readable without colour too.
_SCALE = ((48, 18, 80), (50, 90, 142), (32, 146, 140), (94, 201, 98), (253, 231, 37))


def curves(series: Mapping[str, Sequence[float]], title: str = "", *, width: int = 640, height: int = 360) -> Image:
    """Lines over steps, each on a scale of its own, with first and last value written beside it.

    Args:
        series: Name -> values. Values that are not finite are left out of the line.
        title: Above the picture.
    """
    picture, draw, font = _sheet(width, height, title)
    left, right, top, bottom = 20, width - 150, 44, height - 34
    for i in range(5):
        y = top + (bottom - top) * i / 4
        draw.line([(left, y), (right, y)], fill=_GRID)
    longest = max((len(values) for values in series.values()), default=0)
    for n, (name, values) in enumerate(series.items()):
        finite = [v for v in values if math.isfinite(v)]
        color = _LINES[n % len(_LINES)]
        y = top + 46 * n
        draw.text((right + 14, y), name, fill=color, font=font)
        if not finite:
            draw.text((right + 14, y + 15), "no values", fill=_PALE, font=font)
            continue
        draw.text((right + 14, y + 15), f"{finite[0]:.4g} to {finite[-1]:.4g}", fill=_INK, font=font)
        low, high = min(finite), max(finite)
        span = (high - low) or 1.0
        points = [
            (
                left + (right - left) * i / max(1, longest - 1),
                bottom - (bottom - top) * ((v - low) / span if high > low else 0.5),
            )
            for i, v in enumerate(values)
            if math.isfinite(v)
        ]
        if len(points) == 1:
            draw.ellipse([points[0][0] - 2, points[0][1] - 2, points[0][0] + 2, points[0][1] + 2], fill=color)
        else:
            draw.line(points, fill=color, width=2, joint="curve")
    draw.text((left, bottom + 8), "step 1", fill=_PALE, font=font)
    _right(draw, (right, bottom + 8), f"step {longest}", _PALE, font)
    return picture


def heat_map(
    values: Tensor | Sequence[Sequence[float]],
    row_names: Sequence[str],
    column_names: Sequence[str],
    title: str = "",
    *,
    high: float | None = None,
) -> Image:
    """A table as colours, from 0 (dark) to `high` (bright), every value written into its cell.

    Args:
        values: ``(rows, columns)``, not negative.
        row_names: E.g. blocks. column_names: E.g. LoRAs.
        title: Above the picture.
        high: The brightest value; default the largest, at least 1.
    """
    table = torch.as_tensor(values, dtype=torch.float32)
    rows, columns = table.shape
    finite = table[torch.isfinite(table)]
    high = high or max(1.0, float(finite.max()) if finite.numel() else 1.0)
    cell_w, cell_h = 96, 22 if rows <= 60 else 14
    label = 14 + 7 * max((len(_short(name)) for name in row_names), default=1)
    height = max(cell_h * rows, 60)
    picture, draw, font = _sheet(max(label + cell_w * columns + 70, 320), 76 + height + 16, title)
    for j, name in enumerate(column_names):
        _middle(draw, (label + cell_w * (j + 0.5), 58), _short(name, 15), _INK, font)
    for i, name in enumerate(row_names):
        y = 72 + cell_h * i
        _right(draw, (label - 6, y + cell_h / 2 - 6), _short(name), _INK, font)
        for j in range(columns):
            value = float(table[i, j])
            color = _color(value / high) if math.isfinite(value) else _GRID
            x = label + cell_w * j
            draw.rectangle([x, y, x + cell_w - 2, y + cell_h - 2], fill=color)
            if cell_h > 16:
                ink = _INK if sum(color) > 380 else _PAPER
                _middle(draw, (x + cell_w / 2 - 1, y + cell_h / 2 - 1), f"{value:.2f}", ink, font)
    _scale(draw, label + cell_w * columns + 14, 72, height, high, font)
    return picture


def stacked(parts: Sequence[Image]) -> Image:
    """Pictures one below the other, on white."""
    from PIL import Image

    sheet = Image.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), _PAPER)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def png(picture: Image) -> bytes:
    """A picture as the bytes of a PNG file. Figures have few colours: 256 do, and make it small."""
    from PIL import Image

    buffer = io.BytesIO()
    picture.quantize(256, dither=Image.Dither.NONE).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


def _scale(draw: Any, x: float, y: float, height: float, high: float, font: Any) -> None:
    for i in range(int(height)):
        draw.line([(x, y + i), (x + 12, y + i)], fill=_color(1 - i / height))
    draw.text((x + 17, y - 4), f"{high:.2g}", fill=_PALE, font=font)
    draw.text((x + 17, y + height - 10), "0", fill=_PALE, font=font)


def _color(share: float) -> tuple[int, int, int]:
    position = min(max(share, 0.0), 1.0) * (len(_SCALE) - 1)
    i = min(int(position), len(_SCALE) - 2)
    low, high = _SCALE[i], _SCALE[i + 1]
    r, g, b = (round(a + (c - a) * (position - i)) for a, c in zip(low, high, strict=True))
    return r, g, b


def _sheet(width: int, height: int, title: str) -> tuple[Image, Any, Any]:
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", (int(width), int(height)), _PAPER)
    draw = ImageDraw.Draw(picture)
    draw.text((14, 12), title, fill=_INK, font=ImageFont.load_default(15))
    return picture, draw, ImageFont.load_default(12)


def _short(name: str, limit: int = 34) -> str:
    return name if len(name) <= limit else f"..{name[2 - limit :]}"


def _right(draw: Any, at: tuple[float, float], text: str, fill: Any, font: Any) -> None:
    draw.text((at[0] - draw.textlength(text, font=font), at[1]), text, fill=fill, font=font)


def _middle(draw: Any, at: tuple[float, float], text: str, fill: Any, font: Any) -> None:
    draw.text(at, text, fill=fill, font=font, anchor="mm")
