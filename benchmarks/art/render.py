"""Pictures of subjects in styles: a hand's drawing, some in a treatment, at a random place and size.

A style is a hand (a package) with an optional treatment:

- ``night``: on dark blue. ``chalk``: pale lines on a green board. ``sepia``: brown tones. ``sketch``: grey outlines.
- ``blueprint``: white lines on blue with a grid. ``neon``: glowing lines on near black. ``woodcut``: brown ink on
  paper. ``sticker``: a white border with a shadow on a strong colour. ``pixel``: 16 x 16 pixels. ``duotone``:
  brightness as a colour between violet and orange. ``negative``: inverted colours.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageChops, ImageFilter

from .packages import Hand
from .words import LABELS, STYLES, SUBJECTS

SIZE = 64
HANDS = {
    "glossy": "@iconify-json/fluent-emoji",
    "flat": "@iconify-json/fluent-emoji-flat",
    "cartoon": "@iconify-json/noto",
    "retro": "@iconify-json/noto-v1",
    "simple": "@iconify-json/twemoji",
    "ink": "@iconify-json/fluent-emoji-high-contrast",
    "night": "@iconify-json/fluent-emoji-flat",
    "chalk": "@iconify-json/fluent-emoji-high-contrast",
    "sepia": "@iconify-json/noto",
    "sketch": "@iconify-json/twemoji",
    "comic": "@iconify-json/openmoji",
    "woodcut": "@iconify-json/emojione-monotone",
    "blueprint": "@iconify-json/fluent-emoji-high-contrast",
    "neon": "@iconify-json/emojione-monotone",
    "sticker": "@iconify-json/twemoji",
    "pixel": "@iconify-json/noto",
    "duotone": "@iconify-json/fluent-emoji",
    "negative": "@iconify-json/noto-v1",
}
"""Style -> package of its hand."""

Colour = tuple[int, int, int]
_PLAIN: tuple[Colour, ...] = (
    (255, 255, 255), (255, 255, 255), (255, 255, 255), (238, 238, 240), (225, 238, 250), (253, 243, 219),
    (228, 245, 228), (250, 230, 235),
)  # fmt: skip
"""Backgrounds of styles that have none of their own."""
_STRONG: tuple[Colour, ...] = ((255, 140, 60), (60, 160, 220), (110, 180, 70), (220, 80, 130), (130, 100, 210))
_PAPER, _BROWN = (236, 217, 178), (92, 46, 22)
_BLUE, _GRID = (28, 72, 150), (58, 104, 182)
_DARK = (14, 10, 30)
_GLOWS: tuple[Colour, ...] = ((255, 60, 200), (60, 230, 255), (130, 255, 90))
_VIOLET, _ORANGE = (58, 20, 110), (255, 206, 120)
_NIGHT, _BOARD, _CHALK = (24, 30, 58), (38, 66, 54), (232, 236, 222)
_COFFEE, _CREAM = (60, 36, 18), (244, 228, 200)


def draw_all(folder: Path, out: Path) -> None:
    """Rasterise all subjects by all hands into ``(subjects, hands, 96, 96, 4)`` uint8, in the file `out`."""
    import resvg_py

    packages = list(dict.fromkeys(HANDS.values()))
    hands = [Hand(folder, package) for package in packages]
    drawings = np.stack([
        np.stack([
            np.asarray(Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg)))).convert("RGBA"))
            for svg in (hand.svg(LABELS.get(subject, subject)) for hand in hands)
        ])
        for subject in SUBJECTS
    ])  # fmt: skip
    part = out.with_suffix(".part.npz")
    np.savez_compressed(part, drawings=drawings, subjects=np.array(SUBJECTS), packages=np.array(packages))
    part.replace(out)


@dataclass(frozen=True)
class Drawings:
    """Rasterised drawings ``(subjects, hands, H, H, 4)`` uint8, in the order of `subjects` and `packages`."""

    drawings: NDArray[np.uint8]
    subjects: tuple[str, ...]
    packages: tuple[str, ...]

    @classmethod
    def load(cls, path: Path) -> Drawings:
        with np.load(path) as file:
            return cls(file["drawings"], tuple(file["subjects"].tolist()), tuple(file["packages"].tolist()))

    def render(self, subject: str, style: str, rng: np.random.Generator, *, jitter: float = 1.0) -> NDArray[np.uint8]:
        """Render a picture ``(64, 64, 3)``; at a `jitter` of 1 sizes are 47 to 57 and shifts up to 3 pixels."""
        return self.scene((subject,), style, rng, jitter=jitter)

    def scene(
        self, subjects: Sequence[str], style: str, rng: np.random.Generator, *, jitter: float = 1.0
    ) -> NDArray[np.uint8]:
        """Render subjects beside each other on one background, ``(64, 64 len(subjects), 3)``; nothing for ``""``."""
        layer = Image.new("RGBA", (SIZE * len(subjects), SIZE))
        for i, subject in enumerate(subjects):
            if not subject:
                continue
            drawing = self.drawings[self.subjects.index(subject), self.packages.index(HANDS[style])]
            size = round(52 + jitter * rng.uniform(-5, 5))
            left, top = (round((SIZE - size) / 2 + jitter * rng.uniform(-3, 3)) for _ in range(2))
            # premultiplied by alpha, so that the colour of transparent pixels does not bleed into the border
            resized = Image.fromarray(drawing).convert("RGBa").resize((size, size), Image.Resampling.LANCZOS)
            layer.paste(resized.convert("RGBA"), (SIZE * i + left, top))
        plain = _PLAIN[rng.integers(len(_PLAIN))]
        picture = _TREATMENTS[style](layer, rng) if style in _TREATMENTS else _on(layer, plain)
        return np.asarray(picture)


def _on(layer: Image.Image, background: Colour) -> Image.Image:
    canvas = Image.new("RGBA", layer.size, (*background, 255))
    canvas.alpha_composite(layer)
    return canvas.convert("RGB")


def _ink(layer: Image.Image, colour: Colour) -> Image.Image:
    inked = Image.new("RGBA", layer.size, (*colour, 255))
    inked.putalpha(layer.getchannel("A"))
    return inked


def _blueprint(layer: Image.Image, rng: np.random.Generator) -> Image.Image:
    canvas = np.full((layer.height, layer.width, 3), _BLUE, np.uint8)
    start = rng.integers(8)
    canvas[start::8] = canvas[:, start::8] = _GRID
    picture = Image.fromarray(canvas).convert("RGBA")
    picture.alpha_composite(_ink(layer, (240, 246, 255)))
    return picture.convert("RGB")


def _neon(layer: Image.Image, rng: np.random.Generator) -> Image.Image:
    lines = _ink(layer, _GLOWS[rng.integers(len(_GLOWS))])
    picture = Image.new("RGBA", layer.size, (*_DARK, 255))
    picture.alpha_composite(lines.filter(ImageFilter.GaussianBlur(2.5)))
    picture.alpha_composite(lines)
    return picture.convert("RGB")


def _sticker(layer: Image.Image, rng: np.random.Generator) -> Image.Image:
    outline = layer.getchannel("A").filter(ImageFilter.MaxFilter(7)).filter(ImageFilter.GaussianBlur(0.7))
    picture = Image.new("RGBA", layer.size, (*_STRONG[rng.integers(len(_STRONG))], 255))
    for colour, offset in (((40, 40, 40), 2), ((255, 255, 255), 0)):
        shape = Image.new("RGBA", layer.size, (*colour, 255))
        shape.putalpha(outline)
        picture.alpha_composite(shape, (offset, offset))
    picture.alpha_composite(layer)
    return picture.convert("RGB")


def _pixel(layer: Image.Image, rng: np.random.Generator) -> Image.Image:
    small = _on(layer, _PLAIN[rng.integers(len(_PLAIN))])
    small = small.resize((layer.width // 4, layer.height // 4), Image.Resampling.BOX)
    return small.resize(layer.size, Image.Resampling.NEAREST)


def _tones(layer: Image.Image, dark: Colour, light: Colour) -> Image.Image:
    grey = np.asarray(_on(layer, (255, 255, 255)).convert("L"), np.float64)[..., None] / 255
    grey = np.clip((grey - 0.2) / 0.8, 0, 1) ** 1.5
    mixed = grey * np.array(light) + (1 - grey) * np.array(dark)
    return Image.fromarray(np.round(mixed).astype(np.uint8))


def _sketch(layer: Image.Image) -> Image.Image:
    """Draw dark lines where brightness or alpha change, on white."""
    grey = np.asarray(_on(layer, (255, 255, 255)).convert("L"), np.float64)
    alpha = np.asarray(layer.getchannel("A"), np.float64)
    edges = sum(np.hypot(*np.gradient(x)) for x in (grey, alpha))
    lines = 255 - np.clip(1.6 * edges, 0, 215)
    return Image.fromarray(lines.astype(np.uint8)).convert("RGB")


_TREATMENTS: dict[str, Any] = {
    "night": lambda layer, rng: _on(layer, _NIGHT),
    "chalk": lambda layer, rng: _on(_ink(layer, _CHALK), _BOARD),
    "sepia": lambda layer, rng: _tones(layer, _COFFEE, _CREAM),
    "sketch": lambda layer, rng: _sketch(layer),
    "blueprint": _blueprint,
    "neon": _neon,
    "woodcut": lambda layer, rng: _on(_ink(layer, _BROWN), _PAPER),
    "sticker": _sticker,
    "pixel": _pixel,
    "duotone": lambda layer, rng: _tones(layer, _VIOLET, _ORANGE),
    "negative": lambda layer, rng: ImageChops.invert(_on(layer, (255, 255, 255))),
}


def never_shown(subject: str, style: str) -> bool:
    """Whether a base subject and a base style are never shown together to the base model (one pair in twelve)."""
    return (SUBJECTS.index(subject) * 5 + STYLES.index(style) * 7) % 12 == 0
