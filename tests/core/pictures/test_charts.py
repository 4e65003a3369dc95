"""Charts by their pixels: high values are bright, missing values are not drawn."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.pictures.charts import curves, heat_map

pytest.importorskip("PIL")
DARK, BRIGHT = (48, 18, 80), (253, 231, 37)


def colours(picture) -> set:
    return {colour for _, colour in picture.getcolors(1 << 24)}


def test_heat_map_colours_go_from_zero_to_the_highest():
    picture = heat_map([[0.0, 2.0]], ["block"], ["a", "b"], "title")
    left = 14 + 7 * len("block")
    assert picture.getpixel((left + 3, 75)) == DARK
    assert picture.getpixel((left + 96 + 3, 75)) == BRIGHT


def test_heat_map_scale_reaches_at_least_1():
    """Values below 1 do not fill the scale, because 1 is a LoRA's own strength."""
    assert BRIGHT not in {heat_map([[0.5]], ["x"], ["a"]).getpixel((14 + 7 + 3, 75))}
    half, whole = (heat_map([[0.5]], ["x"], ["a"], high=high).getpixel((14 + 7 + 3, 75)) for high in (1.0, 0.5))
    assert whole == BRIGHT
    assert half == (32, 146, 140)  # the middle of the scale


def test_heat_map_has_a_row_per_name_and_shortens_long_names():
    names = [f"{'very_long_' * 6}{i}" for i in range(80)]
    small, large = heat_map(torch.ones(2, 2), names[:2], ["a", "b"]), heat_map(torch.ones(80, 2), names, ["a", "b"])
    assert small.width == large.width < 600
    assert large.height > 80 * 14
    assert heat_map([[math.nan]], ["x"], ["a"]).size  # a table without finite values


def test_curves_draw_finite_values():
    line, flat, empty = (31, 119, 180), (214, 102, 0), (44, 140, 60)
    picture = curves({"loss": [3.0, math.nan, 1.0], "flat": [2.0], "none": []}, "title")
    assert picture.size == (640, 360)
    columns = [x for x in range(20, 490) if any(picture.getpixel((x, y)) == line for y in range(44, 327))]
    assert columns[0] <= 21
    assert columns[-1] >= 488
    assert {flat, empty} <= colours(picture)
    assert curves({}).size == (640, 360)


def test_curves_fall_from_left_to_right():
    picture = curves({"loss": [2.0, 1.0]})
    heights = {x: next(y for y in range(40, 330) if picture.getpixel((x, y)) == (31, 119, 180)) for x in (30, 480)}
    assert heights[30] < heights[480]


def test_first_curve_is_drawn_over_the_others():
    """Where two lines cross, the first is seen."""
    picture = curves({"loss": [0.0, 1.0], "entropy": [1.0, 0.0]})
    assert picture.getpixel(((20 + 490) // 2, (44 + 326) // 2)) == (31, 119, 180)
