"""Gates over a sampling run: values by hand, the picture by its pixels."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.mole.record import Record
from legomole.core.pictures.charts import lines
from legomole.core.pictures.gate_map import gate_map, means_and_entropies

pytest.importorskip("PIL")
BLUE, ORANGE, GREEN = (31, 119, 180), (214, 102, 0), (44, 140, 60)
LEFT, RIGHT, TOP, BOTTOM = 52, 660 - 196, 44, 220 - 34  # of the chart


def column(picture, x: int, color) -> list[int]:
    return [y for y in range(TOP - 4, BOTTOM + 5) if picture.getpixel((x, y)) == color]


def test_means_and_entropies_by_hand():
    """Two passes, two scopes, two experts."""
    table = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.2, 0.6], [0.6, 0.2]]])
    means, entropies = means_and_entropies(table)
    torch.testing.assert_close(means, torch.tensor([[0.75, 0.25], [0.4, 0.4]]))
    quarter = -(0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    torch.testing.assert_close(entropies, torch.tensor([math.log(2) / 2, quarter]))


def test_means_agree_with_the_record():
    record = Record()
    for value in (0.2, 0.9):
        record.begin_pass({})
        record.gate_opened("a", torch.tensor([[value, 0.5]]))
        record.gate_opened("b", torch.tensor([[0.1, value]]))
    means, entropies = means_and_entropies(record.table())
    torch.testing.assert_close(means.mean(0), record.table().mean((0, 1)))
    assert float(entropies.mean()) == pytest.approx(record.entropy(), abs=1e-6)


def test_lines_share_one_scale():
    """0 is at the bottom, 1 at the top; a gate of one half is half way up whatever the others do."""
    picture = lines([("rising", [0.0, 1.0]), ("half", [0.5, 0.5])], "title")
    assert picture.size == (660, 220)
    assert max(column(picture, LEFT + 1, BLUE)) == pytest.approx(BOTTOM, abs=2)
    assert min(column(picture, RIGHT - 1, BLUE)) == pytest.approx(TOP, abs=2)
    for x in (LEFT + 20, RIGHT - 20):
        assert column(picture, x, ORANGE)[0] == pytest.approx((TOP + BOTTOM) / 2, abs=2)


def test_the_scale_grows_with_the_values():
    """With values up to 2 and below 0 a line of 1 moves down, and the lowest value is at the bottom."""
    picture = lines([("loud", [2.0, 2.0]), ("own strength", [1.0, 1.0]), ("negative", [-1.0, -1.0])], "")
    heights = [column(picture, LEFT + 20, color)[0] for color in (BLUE, ORANGE, GREEN)]
    assert heights == pytest.approx([TOP, TOP + (BOTTOM - TOP) / 3, BOTTOM], abs=2)


def test_after_six_lines_colours_repeat_dashed():
    picture = lines([(str(n), [0.0, 0.0]) for n in range(6)] + [("seventh", [0.5, 0.5])], "")
    assert picture.height == 44 + 7 * 32 + 34
    bottom = picture.height - 34
    row = round((TOP + bottom) / 2)
    drawn = [any(picture.getpixel((x, y)) == BLUE for y in (row - 1, row, row + 1)) for x in range(LEFT + 2, RIGHT - 2)]
    assert 0.3 < sum(drawn) / len(drawn) < 0.8
    assert lines([], "").size == (660, 220)


@pytest.mark.parametrize("experts", [1, 2, 9])
def test_gate_map_is_as_wide_as_its_widest_part(experts):
    table = torch.rand(1 if experts == 1 else 5, 3, experts, generator=torch.Generator().manual_seed(0))
    picture = gate_map(table, ["a", "b", "c"], [f"lora {n}" for n in range(experts)])
    assert picture.width == max(660, 14 + 7 + 96 * experts + 70)
    assert picture.height == 76 + 66 + 16 + max(220, 44 + 32 * experts + 34) + 150


def test_two_loras_of_one_name_have_a_line_each():
    picture = gate_map(torch.tensor([[[0.25, 0.75]], [[0.25, 0.75]]]), ["network"], ["same", "same"])
    assert {BLUE, ORANGE} <= {color for _, color in picture.getcolors(1 << 24)}
