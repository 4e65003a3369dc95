"""Draw the icon and the banner of the node pack: docs/images/icon.png and banner.png.

Usage: python docs/images/brand.py [folder]
"""

from __future__ import annotations

import sys
from pathlib import Path

from legomole.core.pictures.canvas import SERIES, Canvas, Colour, blend

_BRICK, _GAP = 44, 4
_INK: Colour = (28, 30, 38)
# Columns of bricks: those of two LoRAs, and the merged one that keeps some of both.
_STYLE = [SERIES[0]] * 4
_SUBJECT = [SERIES[1]] * 4
_MERGED = [SERIES[0], blend(SERIES[0], SERIES[1], 0.5), SERIES[1]]


def _column(canvas: Canvas, x: float, y: float, colours: list[Colour]) -> None:
    """Draw bricks with two studs each, one above the other."""
    for i, colour in enumerate(colours):
        top = y + i * (_BRICK + _GAP)
        for stud in (0.16, 0.58):
            canvas.box(x + _BRICK * 1.6 * stud, top - 7, _BRICK * 1.6 * 0.26, 8, colour)
        canvas.box(x, top, _BRICK * 1.6, _BRICK - 6, colour)


def _bricks(canvas: Canvas, x: float, y: float) -> None:
    step = _BRICK * 1.6 + 26
    _column(canvas, x, y, _STYLE)
    _column(canvas, x + step, y, _SUBJECT)
    middle = y + 2 * (_BRICK + _GAP) - 8
    left = x + 2 * step - 10
    canvas.line([(left, middle), (left + 26, middle)], _INK, 4)
    canvas.line([(left + 16, middle - 10), (left + 26, middle), (left + 16, middle + 10)], _INK, 4)
    _column(canvas, left + 46, y + (_BRICK + _GAP) / 2, _MERGED)


def draw(folder: Path) -> None:
    icon = Canvas(density=1)
    _bricks(icon, 36, 104)
    icon.finish(400, 400).save(folder / "icon.png", optimize=True)
    banner = Canvas(density=1)
    _bricks(banner, 90, 200)
    banner.text(520, 190, "LegoMoLE", _INK, size=96)
    banner.text(526, 320, "Combine LoRAs without breaking them:", size=38)
    banner.text(526, 372, "LEGO merge and MoLE mix", size=38)
    banner.finish(1400, 600).save(folder / "banner.png", optimize=True)


if __name__ == "__main__":
    draw(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
