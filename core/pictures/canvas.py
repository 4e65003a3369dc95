"""A figure to draw on: Pillow with smooth edges, in units that do not depend on the resolution."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .charts import _GRID, _INK, _PALE, _PAPER

if TYPE_CHECKING:
    from PIL.Image import Image

Colour = tuple[int, int, int]
_FINE, _COARSE = 3, 2  # drawn at 3 pixels a unit, shrunk to 3 / 2


class Sheet:
    """A white sheet, `width` times `height` units; 12 units are a line of text."""

    def __init__(self, width: float, height: float) -> None:
        from PIL import Image, ImageDraw, ImageFont

        self.width, self.height = width, height
        self._image = Image.new("RGB", (round(width * _FINE), round(height * _FINE)), _PAPER)
        self._draw: Any = ImageDraw.Draw(self._image)
        self._font = ImageFont.load_default
        self._fonts: dict[float, Any] = {}

    def finish(self) -> Image:
        """The picture, 1.5 pixels a unit."""
        from PIL import Image

        size = (self._image.width // _COARSE, self._image.height // _COARSE)
        return self._image.resize(size, Image.Resampling.LANCZOS)

    def text(self, x: float, y: float, text: str, fill: Colour = _INK, *, size: float = 12, anchor: str = "la") -> None:
        """Text at a point; `anchor` as Pillow has it: left, middle, right; ascender, middle, baseline .."""
        self._draw.text((x * _FINE, y * _FINE), _printable(text), fill=fill, font=self._sized(size), anchor=anchor)

    def length(self, text: str, size: float = 12) -> float:
        return self._draw.textlength(_printable(text), font=self._sized(size)) / _FINE

    def fitted(self, text: str, width: float, size: float = 12) -> str:
        """The text, with its beginning cut off if it is wider than that."""
        if self.length(text, size) <= width:
            return text
        while len(text) > 1 and self.length(f"..{text}", size) > width:
            text = text[max(1, len(text) // 50) :]
        return f"..{text}"

    def wrapped(self, text: str, width: float, size: float = 12) -> list[str]:
        """The text in lines that fit."""
        lines: list[str] = []
        for word in text.split():
            word = self.fitted(word, width, size)
            if lines and self.length(f"{lines[-1]} {word}", size) <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
        return lines

    def box(self, x: float, y: float, width: float, height: float, fill: Colour) -> None:
        if width > 0 and height > 0:
            at = (round(x * _FINE), round(y * _FINE), round((x + width) * _FINE) - 1, round((y + height) * _FINE) - 1)
            if at[2] >= at[0] and at[3] >= at[1]:
                self._draw.rectangle(at, fill=fill)

    def line(self, points: Sequence[tuple[float, float]], fill: Colour, width: float = 1) -> None:
        self._draw.line(
            [(x * _FINE, y * _FINE) for x, y in points], fill=fill, width=round(width * _FINE), joint="curve"
        )

    def dot(self, x: float, y: float, radius: float, fill: Colour, edge: Colour = _PAPER) -> None:
        r = radius * _FINE
        at = (x * _FINE - r, y * _FINE - r, x * _FINE + r, y * _FINE + r)
        self._draw.ellipse(at, fill=fill, outline=edge, width=2)

    def axes(
        self, x: float, y: float, width: float, height: float, across: Sequence[tuple[float, str]],
        up: Sequence[tuple[float, str]],
    ) -> None:  # fmt: skip
        """A frame with ticks: shares ``0 .. 1`` of its width from the left, of its height from below, and labels."""
        for share, label in up:
            at = y + height * (1 - share)
            self.line([(x, at), (x + width, at)], _GRID, 0.7)
            self.text(x - 6, at, label, _PALE, size=11, anchor="rm")
        for share, label in across:
            at = x + width * share
            self.line([(at, y + height), (at, y + height + 4)], _PALE, 0.7)
            self.text(at, y + height + 7, label, _PALE, size=11, anchor="ma")
        self.line([(x, y + height), (x + width, y + height)], _PALE, 0.7)

    def _sized(self, size: float) -> Any:
        if size not in self._fonts:
            self._fonts[size] = self._font(size * _FINE)
        return self._fonts[size]


def _printable(text: str) -> str:
    """Names are strangers': one line, nothing a font has no answer to."""
    return text if text.isprintable() else "".join(c if c.isprintable() else "?" for c in text)
