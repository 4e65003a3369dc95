"""The canvas by its pixels: sizes, layers, edges, and text that fits."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path

import legomole
import numpy as np
import pytest
from legomole.core.pictures.canvas import HEAT, INK, PAPER, Canvas, blend, heat, ink_on, wrap
from legomole.core.pictures.charts import png

Image = pytest.importorskip("PIL.Image")
RED, BLUE, GREY = (255, 0, 0), (0, 0, 255), (128, 128, 128)


def bounds(picture, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of a colour."""
    ys, xs = np.nonzero((np.asarray(picture) == colour).all(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_units_are_scaled_by_the_density():
    for density, size in ((1, (100, 50)), (1.5, (150, 75)), (2, (200, 100))):
        canvas = Canvas(density)
        canvas.box(20, 10, 40, 20, RED)
        picture = canvas.finish(100, 50)
        assert picture.size == size
        assert bounds(picture, RED) == tuple(round(v * density) for v in (20, 10, 60, 30))
    assert Canvas().finish(100, 100).getcolors() == [(150 * 150, PAPER)]


def test_images_lie_above_shapes_and_below_text_untouched():
    noise = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    canvas = Canvas(density=1)
    canvas.text(0, 0, "I", size=30)
    canvas.image(10, 20, Image.fromarray(noise))
    canvas.box(0, 0, 100, 100, RED)
    pixels = np.asarray(canvas.finish(100, 100))
    assert (pixels[40:60, 10:70] == noise[20:]).all()
    assert (pixels[:20] == INK).all(-1).any()


def test_a_line_has_its_width_and_a_rule_is_one_pixel_wide():
    canvas = Canvas(density=1)
    canvas.line([(10, 20), (90, 20)], RED, 4)
    canvas.rule(10, 40, 80, BLUE)
    canvas.rule(5, 10, 80, GREY, upright=True)
    picture = canvas.finish(100, 100)
    assert bounds(picture, RED) == (10, 18, 90, 22)
    assert bounds(picture, BLUE) == (10, 40, 90, 41)
    assert bounds(picture, GREY) == (5, 10, 6, 90)


def test_shapes_have_smooth_edges():
    canvas = Canvas(density=1)
    canvas.line([(10, 10), (90, 60)], RED, 2)
    canvas.dot(50, 80, 8, BLUE)
    assert len(canvas.finish(100, 100).getcolors()) > 10


def test_dashes_leave_gaps():
    canvas = Canvas(density=1)
    canvas.line([(0, 10), (50, 10), (100, 10)], RED, 2, dashed=True)
    row = [canvas.finish(100, 20).getpixel((x, 10)) == RED for x in range(100)]
    assert 0.3 < sum(row) / 100 < 0.7


def test_a_single_point_is_a_dot_and_no_point_is_nothing():
    for points, drawn in (([(10, 10)], True), ([], False)):
        canvas = Canvas(density=1)
        canvas.line(points, RED, 2)
        assert (len(canvas.finish(20, 20).getcolors()) > 1) == drawn


def test_text_is_shortened_and_wrapped_to_fit():
    canvas = Canvas()
    assert canvas.fitted("short", 100) == "short"
    for keep in ("start", "end"):
        short = canvas.fitted("long " * 40, 100, keep=keep)
        assert short.startswith("..") == (keep == "end")
        assert short.endswith("..") == (keep == "start")
        assert canvas.text_width(short) <= 100
    lines = canvas.wrapped(f"a bc {'d' * 80} e f", 100)
    assert lines[0] == "a bc"
    assert all(canvas.text_width(line) <= 100 for line in lines)
    assert canvas.wrapped("", 100) == []


def test_what_no_font_can_show_is_replaced():
    canvas = Canvas()
    assert canvas.text_width("a\n\0b") == canvas.text_width("a??b")
    canvas.text(0, 0, "a\n\x1b[31mb")
    assert canvas.finish(100, 20).size == (150, 30)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("", []),
        ("one two", ["one two"]),
        ("one two three", ["one two", "three"]),
        ("incomprehensible", ["incompre", "hensible"]),
        ("a incomprehensible b", ["a", "incompre", "hensible", "b"]),
        ("1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19", ["1 2 3 4", "5 6 7 8", "9 10 11", "12 13 14", "15 16.."]),
    ],
)
def test_names_are_broken_between_words_and_cut_after_five_lines(text, lines):
    """Eight characters to a line."""
    assert wrap(text, 8, len, 5) == lines


def test_colours():
    assert blend((0, 0, 0), (200, 100, 50), 0.5) == (100, 50, 25)
    assert [heat(share) for share in (-1, 0, 0.5, 1, 2)] == [HEAT[0], HEAT[0], HEAT[2], HEAT[-1], HEAT[-1]]
    assert [ink_on(colour) for colour in (PAPER, HEAT[0], HEAT[-1])] == [INK, PAPER, INK]


def test_the_page_has_the_same_colour_scale():
    script = (Path(legomole.__file__).parent / "web" / "gate_map.js").read_text(encoding="utf-8")
    scale = re.search(r"const SCALE = (\[\[.*?\]\]);", script)
    assert scale is not None
    assert [tuple(colour) for colour in json.loads(scale[1])] == list(HEAT)


def test_a_png_keeps_rare_colours():
    """A smooth gradient of thousands of colours, and a legend of a few pixels."""
    ramp = np.zeros((300, 300, 3), np.uint8)
    ramp[..., 0], ramp[..., 2] = np.linspace(0, 255, 300)[None], np.linspace(0, 255, 300)[:, None]
    ramp[:4, :4] = (0, 255, 0)
    with Image.open(io.BytesIO(png(Image.fromarray(ramp)))) as picture:
        red, green, blue = picture.convert("RGB").getpixel((1, 1))
    assert red < 20
    assert green > 235
    assert blue < 20
