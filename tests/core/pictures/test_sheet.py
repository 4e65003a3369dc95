"""Sheets by their pixels: images unchanged and in place, names that fit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from legomole.core.pictures.sheet import comparison_sheet

pytest.importorskip("PIL")


def plain(color: tuple[float, float, float], height: int = 192, width: int = 192) -> torch.Tensor:
    return torch.tensor(color).expand(height, width, 3)


RED, GREEN, BLUE, GREY = plain((1, 0, 0)), plain((0, 1, 0)), plain((0, 0, 1)), plain((0.5, 0.5, 0.5))


def inside(picture, color: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of all pixels of a colour."""
    ys, xs = np.nonzero((np.asarray(picture) == color).all(-1))
    return xs.min(), ys.min(), xs.max() + 1, ys.max() + 1


def test_images_lie_in_rows_and_columns_unchanged():
    """Without names: a margin of 12, a gap of 4."""
    picture = comparison_sheet([[RED, GREEN], [BLUE, GREY]], ["", ""], ["", ""])
    assert picture.size == (12 + 192 + 4 + 192 + 12,) * 2
    assert inside(picture, (255, 0, 0)) == (12, 12, 204, 204)
    assert inside(picture, (0, 255, 0)) == (208, 12, 400, 204)
    assert inside(picture, (0, 0, 255)) == (12, 208, 204, 400)
    assert inside(picture, (128, 128, 128)) == (208, 208, 400, 400)


def test_names_do_not_overlap_the_images():
    picture = comparison_sheet([[RED, GREEN]], ["left", "a name " * 60], ["row"], "method", "rank")
    left, top, right, bottom = inside(picture, (255, 0, 0))
    assert (right - left, bottom - top) == (192, 192)
    assert left > 12
    assert top > 12 + 5 * 14
    pixels = np.asarray(picture)
    assert (pixels[top:bottom, left:right] == (255, 0, 0)).all()
    assert (pixels[:12] == 255).all()
    assert (pixels[12:top, left:right] < 100).any()  # ink above
    assert (pixels[top:bottom, 12:left] < 100).any()  # ink beside


def test_small_images_are_enlarged_by_a_whole_number():
    """64 pixels become 192, each a block of 3 x 3."""
    tiny = torch.zeros(64, 64, 3)
    tiny[0, 0] = torch.tensor([1.0, 0, 0])
    picture = comparison_sheet([[tiny]], [""], [""])
    assert picture.size == (12 + 192 + 12,) * 2
    assert inside(picture, (255, 0, 0)) == (12, 12, 15, 15)


def test_the_size_of_a_sheet_is_limited():
    picture = comparison_sheet([[torch.zeros(40, 5000, 3)] * 4], [""] * 4, [""])
    assert 8000 < picture.width < 8192 + 5 * 64
    assert picture.height > 10


def test_a_tall_name_makes_its_row_taller():
    flat = plain((1, 0, 0), 20, 200)
    short, tall = (comparison_sheet([[flat]], [""], [name]) for name in ("a", "one two three four " * 10))
    assert tall.height > short.height
    assert inside(tall, (255, 0, 0))[3] - inside(tall, (255, 0, 0))[1] == 20
