"""The picture of a survey, by its pixels."""

from __future__ import annotations

import pytest
import torch
from legomole.core.lowrank import LowRank
from legomole.core.pictures.canvas import SERIES
from legomole.core.survey.picture import draw_survey
from legomole.core.survey.survey import survey

from .test_survey import A, B, adapter, layers, part

pytest.importorskip("PIL")
COLD, WARM = (33, 102, 172), (178, 24, 43)


def share(picture, colour) -> float:
    """Share of the pixels that have a colour."""
    return sum(n for n, found in picture.getcolors(1 << 24) if found == colour) / (picture.width * picture.height)


def test_negative_overlap_is_blue_and_positive_red():
    picture = draw_survey(survey([A, B]))
    assert picture.width == 1590
    assert share(picture, COLD) == pytest.approx(share(picture, WARM), rel=0.2)  # one cell each, with a number in it
    assert share(picture, COLD) > 0.0005
    apart = draw_survey(survey([A, adapter("c", layers(part((1, 5, 5)), part((1, 5, 5)), part((1, 5, 5))))]))
    assert share(apart, COLD) == share(apart, WARM) == 0


def test_origins_are_bars_in_the_colours_of_the_loras():
    """Units of one LoRA alone have its colour, units of several the paler one: here those of the same LoRA twice."""
    pale = tuple(round(x + (255 - x) * 0.62) for x in SERIES[0])
    twice = draw_survey(survey([A, adapter("b", dict(A.modules))]))
    assert share(twice, pale) > 0.005
    other = adapter("c", {name: LowRank(p.A.flip(1), p.B.flip(0)) for name, p in A.modules.items() if ".a." in name})
    alone = adapter("a", {name: p for name, p in A.modules.items() if ".a." in name})
    pure = draw_survey(survey([alone, other]))  # of rank 1: one unit, of both
    assert share(pure, pale) > 0.005
    assert share(draw_survey(survey([alone])), pale) == 0


def test_one_lora_has_no_pairs_and_no_origins():
    one, two = draw_survey(survey([A])), draw_survey(survey([A, B]))
    assert one.height < two.height
    assert share(one, SERIES[1]) == 0
    assert share(two, SERIES[1]) > 0.002


@pytest.mark.parametrize("n", [7, 9])
def test_many_loras_with_long_names_and_other_scripts(n):
    several = [
        adapter(f"{'very long ' * 20}\n\0\x1b[31m <b>{i} 水彩", layers(part((i + 1, i % 6, 0)), part((1, 1, i % 6))))
        for i in range(n)
    ]
    picture = draw_survey(survey(several))
    assert picture.width == 1590
    assert picture.height < 2500
    assert all(share(picture, colour) > 0 for colour in SERIES)


def test_many_blocks_and_nothing_at_all():
    g = torch.Generator().manual_seed(0)
    names = [f"model.layers.{i}.{x}.q" for i in range(60) for x in ("a", "b")]
    a, b = (
        adapter(x, {n: LowRank(torch.randn(2, 4, generator=g), torch.randn(3, 2, generator=g)) for n in names})
        for x in "ab"
    )
    assert draw_survey(survey([a, b])).height < 2500
    zero = adapter("z", {"x": LowRank(torch.zeros(2, 4), torch.zeros(3, 2))})
    assert draw_survey(survey([zero])).height > 500
    assert draw_survey(survey([zero, zero])).height > 500


def test_the_same_survey_gives_the_same_picture():
    assert draw_survey(survey([A, B])).tobytes() == draw_survey(survey([A, B])).tobytes()
