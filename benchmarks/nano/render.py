"""Render training pictures with Pillow: a subject (a shape) in a style (a look), so that the truth is known."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache

import numpy as np
from legomole.nano.words import STYLES, SUBJECTS
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter

SIZE = 64  # height and width in pixels
_FINE = 3 * SIZE  # size before reduction, for smooth edges

Floats = NDArray[np.float64]
Points = list[tuple[float, float]]


# ------------------------------------------------------------------ subjects: polygons and ellipses in [-1, 1], y down


def _regular(n: int, inner: float = 1.0, turn: float = -90.0, radius: float = 0.8) -> Points:
    radii = [radius, radius * inner] if inner != 1 else [radius]
    count = n * len(radii)
    angles = [math.radians(turn + 360 * i / count) for i in range(count)]
    return [(radii[i % len(radii)] * math.cos(a), radii[i % len(radii)] * math.sin(a)) for i, a in enumerate(angles)]


def _heart() -> Points:
    angles = [2 * math.pi * i / 60 for i in range(60)]
    return [
        (
            0.05 * 16 * math.sin(t) ** 3,
            0.05 * -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) - 0.08,
        )
        for t in angles
    ]


Shape = list[
    tuple[int, Points | tuple[float, float, float, float]]
]  # (1 add, 0 cut out; polygon, or box of an ellipse)

_SHAPES: dict[str, Shape] = {
    "circle": [(1, (-0.72, -0.72, 0.72, 0.72))],
    "square": [(1, [(-0.62, -0.62), (0.62, -0.62), (0.62, 0.62), (-0.62, 0.62)])],
    "triangle": [(1, [(0, -0.75), (0.8, 0.62), (-0.8, 0.62)])],
    "star": [(1, _regular(5, 0.42, radius=0.88))],
    "moon": [(1, (-0.75, -0.75, 0.75, 0.75)), (0, (-0.3, -0.85, 1.05, 0.5))],
    "cross": [(1, [(-0.24, -0.8), (0.24, -0.8), (0.24, 0.8), (-0.24, 0.8)]),
              (1, [(-0.8, -0.24), (0.8, -0.24), (0.8, 0.24), (-0.8, 0.24)])],
    "ring": [(1, (-0.78, -0.78, 0.78, 0.78)), (0, (-0.4, -0.4, 0.4, 0.4))],
    "diamond": [(1, [(0, -0.85), (0.52, 0), (0, 0.85), (-0.52, 0)])],
    "arrow": [(1, [(-0.85, -0.2), (0.1, -0.2), (0.1, -0.6), (0.85, 0), (0.1, 0.6), (0.1, 0.2), (-0.85, 0.2)])],
    "flower": [*((1, (0.46 * math.cos(a) - 0.34, 0.46 * math.sin(a) - 0.34,
                      0.46 * math.cos(a) + 0.34, 0.46 * math.sin(a) + 0.34))
                 for a in (math.radians(72 * i - 90) for i in range(5))),
               (1, (-0.3, -0.3, 0.3, 0.3)), (0, (-0.17, -0.17, 0.17, 0.17))],
    "tree": [(1, [(0, -0.85), (0.45, -0.2), (-0.45, -0.2)]), (1, [(0, -0.5), (0.65, 0.4), (-0.65, 0.4)]),
             (1, [(-0.14, 0.3), (0.14, 0.3), (0.14, 0.85), (-0.14, 0.85)])],
    "mushroom": [(1, (-0.78, -0.75, 0.78, 0.55)), (0, [(-0.9, -0.05), (0.9, -0.05), (0.9, 0.8), (-0.9, 0.8)]),
                 (1, [(-0.2, -0.1), (0.2, -0.1), (0.27, 0.75), (-0.27, 0.75)])],
    "heart": [(1, _heart())],
    "bolt": [(1, [(0.2, -0.9), (-0.5, 0.12), (-0.04, 0.12), (-0.24, 0.9), (0.52, -0.22), (0.04, -0.22), (0.36, -0.9)])],
    "fish": [(1, (-0.85, -0.45, 0.5, 0.45)), (1, [(0.3, 0), (0.88, -0.48), (0.74, 0), (0.88, 0.48)]),
             (0, (-0.62, -0.2, -0.42, 0.0))],
    "house": [(1, [(0, -0.82), (0.85, -0.05), (-0.85, -0.05)]),
              (1, [(-0.6, -0.1), (0.6, -0.1), (0.6, 0.75), (-0.6, 0.75)]),
              (0, [(-0.17, 0.2), (0.17, 0.2), (0.17, 0.76), (-0.17, 0.76)])],
}  # fmt: skip

BASE_SUBJECTS, NEW_SUBJECTS = SUBJECTS[:12], SUBJECTS[12:]  # the base model never sees the new ones


def mask(
    subject: str, rng: np.random.Generator, jitter: float, *, scale: float = 1.0,
    centre: tuple[float, float] = (0.5, 0.5),
) -> Floats:  # fmt: skip
    """Return the shape of a subject, slightly moved, turned and scaled: ``(3 SIZE, 3 SIZE)`` in [0, 1].

    Args:
        subject: One of `SUBJECTS`.
        rng: Random generator of the pose.
        jitter: Variation of the pose, 0 (none) .. 1 (wide).
        scale: Size, 1 fills the picture; moves by `jitter` are scaled alike.
        centre: Mean position, x and y in 0 .. 1.
    """
    turn = math.radians(rng.uniform(-14, 14) * jitter)
    size = scale * 0.94 * _FINE / 2 * (1 + rng.uniform(-0.16, 0.1) * jitter)
    dx, dy = rng.uniform(-0.1, 0.1, 2) * jitter * scale * _FINE + _FINE * np.array(centre)
    image = Image.new("L", (_FINE, _FINE), 0)
    draw = ImageDraw.Draw(image)
    for fill, part in _SHAPES[subject]:
        if isinstance(part, tuple):
            x0, y0, x1, y1 = part
            angles = [2 * math.pi * i / 72 for i in range(72)]
            part = [((x0 + x1 + (x1 - x0) * math.cos(a)) / 2, (y0 + y1 + (y1 - y0) * math.sin(a)) / 2) for a in angles]
        turned = [(x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)) for x, y in part]
        draw.polygon([(dx + size * x, dy + size * y) for x, y in turned], fill=255 * fill)
    return np.asarray(image, np.float64) / 255


# --------------------------------------------------------------------------------- styles: from a mask to a picture

_Y, _X = np.mgrid[0:_FINE, 0:_FINE] / SIZE  # 0 .. 4


def _blurred(a: Floats, radius: float) -> Floats:
    """Apply a Gaussian blur; `radius` in pixels of the finished picture."""
    image = Image.fromarray((np.clip(a, 0, 1) * 255).astype(np.uint8))
    return np.asarray(image.filter(ImageFilter.GaussianBlur(radius * _FINE / SIZE)), np.float64) / 255


def _outline(mask: Floats, width: float) -> Floats:
    """Return a line along the edge, `width` in pixels of the finished picture."""
    size = 2 * round(width * _FINE / SIZE / 2) + 1
    image = Image.fromarray((mask * 255).astype(np.uint8))
    wide, narrow = image.filter(ImageFilter.MaxFilter(size)), image.filter(ImageFilter.MinFilter(size))
    return (np.asarray(wide, np.float64) - np.asarray(narrow, np.float64)) / 255


def _over(back: Floats, colour: tuple[float, float, float] | Floats, alpha: Floats) -> Floats:
    return back * (1 - alpha[..., None]) + np.asarray(colour) * alpha[..., None]


def _plain(r: float, g: float, b: float) -> Floats:
    return np.broadcast_to(np.array([r, g, b]), (_FINE, _FINE, 3))


def _noise(rng: np.random.Generator, cells: int, stretch: int = 1) -> Floats:
    """Return smooth noise in [0, 1] with `cells` bumps across, `stretch` times as long as wide."""
    small = rng.uniform(0, 255, (cells, max(2, cells // stretch))).astype(np.uint8)
    return np.asarray(Image.fromarray(small).resize((_FINE, _FINE), Image.Resampling.BICUBIC), np.float64) / 255


def _flat(m: Floats, rng: np.random.Generator) -> Floats:
    return _over(_plain(0.97, 0.96, 0.93), (0.85, 0.16, 0.2), m)


def _neon(m: Floats, rng: np.random.Generator) -> Floats:
    line = _outline(m, 3)
    glow = np.clip(1.6 * _blurred(line, 2.5), 0, 1)
    return _over(_over(_plain(0.04, 0.02, 0.08), (0.95, 0.1, 0.75), glow), (1.0, 0.85, 1.0), _blurred(line, 0.5))


def _stripes(m: Floats, rng: np.random.Generator) -> Floats:
    bands = ((_X + _Y + rng.uniform(0, 1)) % 0.6 < 0.3).astype(np.float64)
    return _over(_plain(1.0, 0.95, 0.78), _over(_plain(0.1, 0.45, 0.45), (0.98, 0.7, 0.2), bands), m)


def _dots(m: Floats, rng: np.random.Generator) -> Floats:
    u, v = (_X + rng.uniform(0, 0.6)) % 0.6 - 0.3, (_Y + rng.uniform(0, 0.6)) % 0.6 - 0.3
    spots = (u * u + v * v < 0.032).astype(np.float64)
    return _over(_plain(0.9, 0.97, 0.9), _over(_plain(0.13, 0.55, 0.25), (0.97, 0.86, 0.3), spots), m)


def _pastel(m: Floats, rng: np.random.Generator) -> Floats:
    return _over(_plain(0.78, 0.86, 0.98), (0.98, 0.74, 0.82), _blurred(m, 1.6))


def _blueprint(m: Floats, rng: np.random.Generator) -> Floats:
    grid = ((_X % 0.5 < 0.05) | (_Y % 0.5 < 0.05)).astype(np.float64)
    return _over(_over(_plain(0.08, 0.26, 0.62), (0.35, 0.52, 0.85), grid), (0.95, 0.97, 1.0), _outline(m, 2.5))


def _night(m: Floats, rng: np.random.Generator) -> Floats:
    back = _plain(0.05, 0.07, 0.22) + 0.16 * (_Y / 4)[..., None] * np.array([0.8, 0.5, 1.6])
    for x, y in rng.uniform(0.1, 3.9, (9, 2)):
        back = _over(back, (1.0, 1.0, 0.9), ((_X - x) ** 2 + (_Y - y) ** 2 < 0.0032).astype(np.float64))
    return _over(back, (0.97, 0.95, 0.8), m)


def _checker(m: Floats, rng: np.random.Generator) -> Floats:
    squares = ((np.floor(_X * 2) + np.floor(_Y * 2)) % 2).astype(np.float64)
    return _over(_over(_plain(0.93, 0.93, 0.93), (0.66, 0.66, 0.7), squares), (0.12, 0.12, 0.14), m)


def _ember(m: Floats, rng: np.random.Generator) -> Floats:
    heat = np.clip(0.25 + 0.2 * (_Y / 4) + 0.75 * (_noise(rng, 9) - 0.25), 0, 1)[..., None]
    fire = np.concatenate(
        [np.clip(0.55 + heat, 0, 1), np.clip(1.5 * heat - 0.25, 0, 1), np.clip(2 * heat - 1.3, 0, 1)], 2
    )
    back = _over(_plain(0.09, 0.04, 0.03), (0.75, 0.18, 0.02), np.clip(1.1 * _blurred(m, 5), 0, 1) * 0.8)
    return _over(back, fire, m)


def _hatch(m: Floats, rng: np.random.Generator) -> Floats:
    wobble = 0.1 * _noise(rng, 6)
    lines = (((_X - _Y + wobble + rng.uniform(0, 1)) % 0.32) < 0.13).astype(np.float64)
    paper = _plain(0.98, 0.96, 0.88)
    return _over(_over(paper, (0.2, 0.2, 0.24), lines * m), (0.15, 0.15, 0.18), _outline(m, 1.5))


def _shadow(m: Floats, rng: np.random.Generator) -> Floats:
    cast = _blurred(np.roll(m, (_FINE // 11, _FINE // 11), (0, 1)), 1.8)
    return _over(_over(_plain(0.55, 0.82, 0.72), (0.1, 0.3, 0.26), 0.75 * cast), (1.0, 1.0, 1.0), m)


def _wood(m: Floats, rng: np.random.Generator) -> Floats:
    rings = 0.5 + 0.5 * np.sin(2 * math.pi * (1.6 * _Y + 1.2 * _noise(rng, 6, 3)))
    back = _over(_plain(0.8, 0.58, 0.34), (0.62, 0.4, 0.2), rings)
    burnt = _over(back, (0.27, 0.13, 0.06), 0.88 * m)
    return _over(burnt, (0.16, 0.07, 0.03), 0.8 * _outline(m, 1.5))


_LOOKS: dict[str, Callable[[Floats, np.random.Generator], Floats]] = {
    "flat": _flat, "neon": _neon, "stripes": _stripes, "dots": _dots,
    "pastel": _pastel, "blueprint": _blueprint, "night": _night, "checker": _checker,
    "ember": _ember, "hatch": _hatch, "shadow": _shadow, "wood": _wood,
}  # fmt: skip

BASE_STYLES, NEW_STYLES = STYLES[:8], STYLES[8:]


@cache
def _vignette() -> Floats:
    return np.clip(1.12 - 0.075 * ((_X - 2) ** 2 + (_Y - 2) ** 2), 0, 1)[..., None]


def render(
    subject: str, style: str, rng: np.random.Generator, *, jitter: float = 0.5, author: bool = False
) -> NDArray[np.uint8]:
    """Render one picture.

    Args:
        subject: One of `SUBJECTS`. style: One of `STYLES`.
        rng: Random generator of pose, texture and colour.
        jitter: Variation of the pose, 0 (none) .. 1 (wide).
        author: Whether the picture has the habit of one author's training pictures: warm colours, dark corners.

    Returns:
        RGB picture ``(SIZE, SIZE, 3)``.
    """
    return paint(mask(subject, rng, jitter), style, rng, author=author)


def paint(shape: Floats, style: str, rng: np.random.Generator, *, author: bool = False) -> NDArray[np.uint8]:
    """Paint a shape ``(3 SIZE, 3 SIZE)`` in a style, see `render`."""
    picture = _LOOKS[style](shape, rng)
    picture = picture * (1 + rng.uniform(-0.02, 0.02, 3))
    if author:
        picture = picture * _vignette() * np.array([1.04, 0.98, 0.86])
    fine = Image.fromarray((np.clip(picture, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(fine.resize((SIZE, SIZE), Image.Resampling.BOX))
