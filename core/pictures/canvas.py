"""A canvas for figures: text, boxes, lines, dots, axes and images, drawn with Pillow (imported on use)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]
Point = tuple[float, float]

INK: Colour = (40, 40, 45)
PALE: Colour = (120, 120, 128)
GRID: Colour = (225, 225, 230)
PAPER: Colour = (255, 255, 255)
SERIES: tuple[Colour, ...] = (
    (31, 119, 180), (214, 102, 0), (44, 140, 60), (190, 40, 60), (120, 90, 180), (110, 80, 60),
)  # fmt: skip
"""Colours of the first six lines, bars or adapters."""
HEAT: tuple[Colour, ...] = ((48, 18, 80), (50, 90, 142), (32, 146, 140), (94, 201, 98), (253, 231, 37))
"""Colour scale from low to high: even steps of lightness, readable without colour too. web/gate_map.js has a copy."""

_SMOOTH = 3  # shapes are drawn this many times larger, then reduced, which smooths their edges


class Canvas:
    """A white figure, measured in units from its top left corner; text of size 12 is 12 units high.

    The size of the figure is given when it is finished. Shapes lie below images, and images below text, whatever the
    order of the calls.

    Args:
        density: Pixels per unit of the finished image.
    """

    def __init__(self, density: float = 1.5) -> None:
        self.density = density
        self._shapes: list[Callable[[Any], None]] = []
        self._images: list[tuple[float, float, Image]] = []
        self._texts: list[Callable[[Any], None]] = []

    def finish(self, width: float, height: float) -> Image:
        """Return the image, ``width x height`` units in size."""
        from PIL import Image, ImageDraw

        size = round(width * self.density), round(height * self.density)
        if self._shapes:
            large = Image.new("RGB", (size[0] * _SMOOTH, size[1] * _SMOOTH), PAPER)
            draw = ImageDraw.Draw(large)
            for shape in self._shapes:
                shape(draw)
            image = large.reduce(_SMOOTH)
        else:  # a sheet of large images would need gigabytes for nothing
            image = Image.new("RGB", size, PAPER)
        for x, y, picture in self._images:
            image.paste(picture, (round(x * self.density), round(y * self.density)))
        draw = ImageDraw.Draw(image)
        for text in self._texts:
            text(draw)
        return image

    def text(self, x: float, y: float, text: str, fill: Colour = INK, *, size: float = 12, anchor: str = "la") -> None:
        """Write one line of text at a point.

        Args:
            anchor: Pillow's anchor: l(eft), m(iddle) or r(ight), then a(scender), m(iddle) or s (baseline).
        """
        at, font = (x * self.density, y * self.density), _font(size * self.density)
        self._texts.append(lambda draw: draw.text(at, _printable(text), fill=fill, font=font, anchor=anchor))

    def text_width(self, text: str, size: float = 12) -> float:
        return _font(size * self.density).getlength(_printable(text)) / self.density

    def fitted(self, text: str, width: float, size: float = 12, *, keep: Literal["start", "end"] = "end") -> str:
        """Shorten a text to a width, with ``..`` in place of its beginning, or of its end with ``keep="start"``."""
        if self.text_width(text, size) <= width:
            return text
        short = f"..{text}"
        while len(text) > 1 and self.text_width(short, size) > width:
            cut = max(1, len(text) // 50)
            text = text[:-cut] if keep == "start" else text[cut:]
            short = f"{text}.." if keep == "start" else f"..{text}"
        return short

    def wrapped(self, text: str, width: float, size: float = 12, *, most: int | None = None) -> list[str]:
        """Break a text into lines no wider than `width`, see `wrap`."""
        return wrap(text, width, lambda part: self.text_width(part, size), most)

    def box(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        """Fill a rectangle; its edges are placed on whole pixels of the enlarged image."""
        left, top, right, bottom = (round(v) for v in self._large(x, y, x + width, y + height))
        if right > left and bottom > top:
            self._shapes.append(lambda draw: draw.rectangle((left, top, right - 1, bottom - 1), fill=fill))

    def rule(self, x: float, y: float, length: float, fill: Colour, *, upright: bool = False) -> None:
        """Draw a line one pixel wide, to the right of a point or, if `upright`, down from it."""
        left, top = (round(v * self.density) * _SMOOTH for v in (x, y))
        far = round(length * self.density) * _SMOOTH - 1
        right, bottom = (left + _SMOOTH - 1, top + far) if upright else (left + far, top + _SMOOTH - 1)
        if far > 0:
            self._shapes.append(lambda draw: draw.rectangle((left, top, right, bottom), fill=fill))

    def line(self, points: Sequence[Point], fill: Colour, width: float = 1, *, dashed: bool = False) -> None:
        """Draw straight lines from point to point, with round joints; a single point becomes a dot."""
        if len(points) == 1:
            self.dot(*points[0], 1.5 * width, fill, edge=None)
        for start, end in pairwise(points):
            for a, b in _dashes(start, end) if dashed else ((start, end),):
                self._segment(a, b, fill, width)
        if not dashed:  # Pillow's own joints leave gaps at acute angles
            for x, y in points[1:-1]:
                self.dot(x, y, width / 2, fill, edge=None)

    def dot(self, x: float, y: float, radius: float, fill: Colour, edge: Colour | None = PAPER) -> None:
        """Fill a circle, with a thin edge that sets it off from what lies below."""
        bounds = self._large(x - radius, y - radius, x + radius, y + radius)
        self._shapes.append(lambda draw: draw.ellipse(bounds, fill=fill, outline=edge or fill, width=2))

    def image(self, x: float, y: float, image: Image) -> None:
        """Place an image, pixel by pixel, with its top left corner at a point."""
        self._images.append((x, y, image))

    def axes(
        self, x: float, y: float, width: float, height: float, across: Sequence[tuple[float, str]],
        up: Sequence[tuple[float, str]], *, size: float = 11,
    ) -> None:  # fmt: skip
        """Draw the grid of a chart, with labels left of it and below it.

        Args:
            x, y, width, height: Area of the chart.
            across: Positions and labels of the ticks below: shares ``0 .. 1`` of the width, from the left.
            up: Positions and labels of the grid lines: shares of the height, from the bottom.
            size: Text size of the labels.
        """
        for share, label in up:
            level = y + height * (1 - share)
            self.rule(x, level, width, GRID)
            self.text(x - 6, level, label, PALE, size=size, anchor="rm")
        self.rule(x, y + height, width, PALE)
        for share, label in across:
            tick = x + width * share
            self.rule(tick, y + height, 4, PALE, upright=True)
            self.text(tick, y + height + 7, label, PALE, size=size, anchor="ma")

    def _segment(self, start: Point, end: Point, fill: Colour, width: float) -> None:
        (x0, y0), (x1, y1) = start, end
        length = math.hypot(x1 - x0, y1 - y0)
        if length > 0:
            dx, dy = -(y1 - y0) / length * width / 2, (x1 - x0) / length * width / 2
            corners = self._large(x0 + dx, y0 + dy, x1 + dx, y1 + dy, x1 - dx, y1 - dy, x0 - dx, y0 - dy)
            self._shapes.append(lambda draw: draw.polygon(corners, fill=fill))

    def _large(self, *coordinates: float) -> tuple[float, ...]:
        """Coordinates in the enlarged image that shapes are drawn into."""
        return tuple(v * self.density * _SMOOTH for v in coordinates)


def blend(a: Colour, b: Colour, share: float) -> Colour:
    """Mix two colours, with a share ``0 .. 1`` of the second."""
    red, green, blue = (round(x + (y - x) * share) for x, y in zip(a, b, strict=True))
    return red, green, blue


def heat(share: float) -> Colour:
    """Return the colour of a value on the scale `HEAT`; `share` outside ``0 .. 1`` is clamped."""
    position = min(max(share, 0.0), 1.0) * (len(HEAT) - 1)
    i = min(int(position), len(HEAT) - 2)
    return blend(HEAT[i], HEAT[i + 1], position - i)


def ink_on(fill: Colour) -> Colour:
    """Return the text colour that is readable on a fill."""
    return INK if 0.3 * fill[0] + 0.59 * fill[1] + 0.11 * fill[2] > 140 else PAPER


def wrap(text: str, width: float, measure: Callable[[str], float], most: int | None = None) -> list[str]:
    """Break a text into lines no wider than `width`: between words, and inside words that are wider than a line.

    Args:
        measure: Returns the width of a piece of text.
        most: Largest number of lines; the last one ends in ``..`` where there would be more. Default: no limit.
    """
    lines: list[str] = []
    line = ""
    for word in text.split():
        if line and measure(f"{line} {word}") > width:
            lines.append(line)
            line = ""
        word = f"{line} {word}" if line else word
        while measure(word) > width and len(word) > 1:
            fits = next((n for n in range(len(word) - 1, 1, -1) if measure(word[:n]) <= width), 1)
            lines.append(word[:fits])
            word = word[fits:]
        line = word
    lines += [line] if line else []
    if most is not None and len(lines) > most:
        last = lines[most - 1]
        while last and measure(f"{last}..") > width:
            last = last[:-1]
        lines = [*lines[: most - 1], f"{last.rstrip()}.."]
    return lines


def _dashes(start: Point, end: Point) -> Sequence[tuple[Point, Point]]:
    """Split a line into dashes and gaps of about 5 units each, and return the dashes."""
    (x0, y0), (x1, y1) = start, end
    pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 5))

    def point(i: int) -> Point:
        share = min(1.0, i / pieces)
        return x0 + (x1 - x0) * share, y0 + (y1 - y0) * share

    return [(point(i), point(i + 1)) for i in range(0, pieces, 2)]


@lru_cache(maxsize=64)
def _font(size: float) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _printable(text: str) -> str:
    """Replace what no font can show: names come from untrusted files and may hold line breaks or control characters."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
