"""From axes to cells, by hand: content of the cells, equal cells, and errors."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from legomole.core.errors import MergeError
from legomole.core.merge.account import Prediction
from legomole.core.merge.methods import METHODS
from legomole.core.pictures.comparison import (
    AXIS_KINDS,
    METHOD_CHOICES,
    Axis,
    Cell,
    ModelSetup,
    cells_by_setup,
    describe_cells,
    grid_of_cells,
)
from legomole.core.recipes.sweep import Candidate, Sweep

ONE = Axis("nothing", ("",))


def grid(x: Axis, y: Axis = ONE, **settings: Any) -> list[list[Cell]]:
    defaults = {"method": "lego", "rank": "1x", "seed": 5, "prompt": "a cat", "loras": 2, "statistics": False}
    return grid_of_cells(x, y, **{**defaults, **settings})


def setups(*args: Any, **settings: Any) -> list[list[ModelSetup]]:
    return [[cell.setup for cell in row] for row in grid(*args, **settings)]


def parse(kind: str, text: str) -> Axis:
    return Axis.parse("x", kind, text)


def test_values_are_separated_by_commas_or_lines_and_prompts_by_lines():
    assert parse("method", " none, svd ,lego\nmole,").values == ("none", "svd", "lego", "mole")
    assert parse("prompt", "a cat, sitting\n\n a dog ").values == ("a cat, sitting", "a dog")
    assert parse("nothing", "left over").values == ("",)


def test_methods_across_ranks_down():
    """A method without a rank is the same in every row, and so is the plain model."""
    found = setups(parse("method", "none, concat, svd, mole"), parse("rank", "8, auto"))
    even = (1.0, 1.0)
    assert found == [
        [
            ModelSetup("none"),
            ModelSetup("concat", "", even),
            ModelSetup("svd", "8", even),
            ModelSetup("mole", "", even),
        ],
        [
            ModelSetup("none"),
            ModelSetup("concat", "", even),
            ModelSetup("svd", "95%", even),
            ModelSetup("mole", "", even),
        ],
    ]


def test_strengths_multiply():
    """The column changes all LoRAs, the row also the second; all at 0 is the plain model."""
    found = setups(parse("strength", "0, 0.5, 2"), parse("strength 2", "0, 3"), method="concat")
    assert found == [
        [ModelSetup("none"), ModelSetup("concat", "", (0.5, 0.0)), ModelSetup("concat", "", (2.0, 0.0))],
        [ModelSetup("none"), ModelSetup("concat", "", (0.5, 1.5)), ModelSetup("concat", "", (2.0, 6.0))],
    ]


def test_seeds_and_prompts_share_a_setup():
    found = grid(parse("seed", "1, 18446744073709551615"), parse("prompt", "a cat\na dog"))
    setup = ModelSetup("lego", "1x", (1.0, 1.0))
    assert found[1] == [Cell(setup, 1, "a dog"), Cell(setup, 2**64 - 1, "a dog")]
    assert cells_by_setup(found) == {setup: [*found[0], *found[1]]}


def test_equal_cells_are_grouped_once_in_order():
    found = grid(parse("method", "svd, none, svd"), parse("rank", "auto, 95.0%"))
    assert cells_by_setup(found) == {found[0][0].setup: [found[0][0]], ModelSetup("none"): [found[0][1]]}


def test_settings_without_an_axis_come_from_the_widgets():
    assert grid(ONE, method="svd", rank="16") == [[Cell(ModelSetup("svd", "16", (1.0, 1.0)), 5, "a cat")]]
    assert setups(parse("method", "none"), loras=0, rank="not used") == [[ModelSetup("none")]]


def test_every_method_can_be_chosen():
    assert set(METHOD_CHOICES) == {*METHODS, "none", "mole", "lego calibrated"}
    found = setups(parse("method", ", ".join(METHOD_CHOICES)), statistics=True)[0]
    assert {setup.method for setup in found if setup.needs_statistics} == {"calibrated", "lego calibrated", "ssr"}
    assert {setup.method for setup in found if not setup.rank} == {"none", "mole", "concat", "linear"}
    assert {setup.merge_method for setup in found if setup.is_merge} == set(METHODS)
    assert AXIS_KINDS[:4] == ("method", "rank", "strength", "strength 1")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("method", "lego, magic", ("no such method", "x axis", "magic", "mole")),
        ("rank", "8, 0x", ("not a rank", "x axis", "0x")),
        ("strength", "1, nan", ("not a strength", "x axis", "nan")),
        ("strength 2", "loud", ("not a strength", "loud")),
        ("seed", "1.5", ("not a seed", "1.5")),
        ("seed", "18446744073709551616", ("not a seed",)),
        ("prompt", " \n ", ("The x axis has no values.", "one per line", "x_values")),
    ],
)
def test_wrong_values_raise(kind, text, words):
    with pytest.raises(MergeError) as error:
        parse(kind, text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("axes", "settings", "words"),
    [
        ((Axis("seed", ("1",)), Axis("seed", ("2",))), {}, "Both axes change the same setting: seed."),
        ((Axis("strength 3", ("1",)),), {}, "a LoRA that is not there"),
        ((ONE,), {"loras": 0}, "No LoRA is connected, and lego needs at least one."),
        ((Axis("method", ("mole",)),), {"loras": 0}, "and mole needs at least one"),
        ((ONE,), {"method": "lego calibrated"}, "The method lego calibrated needs statistics."),
        ((ONE,), {"rank": "many"}, "This is not a rank."),
    ],
)
def test_impossible_grids_raise(axes, settings, words):
    with pytest.raises(MergeError, match=words):
        grid(*axes, **settings)


def test_titles_name_the_lora():
    labels = ["ember", "heart"]
    assert [parse(kind, "1").title(labels) for kind in ("strength", "strength 2", "nothing")] == [
        "strength",
        "strength 2 (heart)",
        "",
    ]


def test_the_description_has_a_line_per_cell():
    found = grid(parse("method", "none, svd, none"), parse("strength 1", "1, 0.5"))
    first, svd, weak = found[0][0], found[0][1], found[1][1]
    text = describe_cells(found, {first: 2.0, svd: 1.25, weak: 1.0}, {svd.setup: "merged in 0.1 s"})
    assert text.splitlines() == [
        "6 cells, 3 sampled in 4.2 s",
        "  row 1, column 1: none, seed 5: 2.0 s",
        "  row 1, column 2: svd, rank 1x, seed 5: 1.2 s; merged in 0.1 s",
        "  row 1, column 3: the same as row 1, column 1",
        "  row 2, column 1: the same as row 1, column 1",
        "  row 2, column 2: svd, rank 1x, strengths x 0.5, 1, seed 5: 1.0 s",
        "  row 2, column 3: the same as row 1, column 1",
    ]


def test_the_description_names_prompts_if_there_are_several():
    found = grid(parse("prompt", "a cat\na dog"), method="concat")
    text = describe_cells(found, dict.fromkeys(found[0], 1.0), {found[0][0].setup: "whole"})
    assert text.splitlines() == [
        "2 cells, 2 sampled in 2.0 s",
        '  row 1, column 1: concat, seed 5, "a cat": 1.0 s; whole',
        '  row 1, column 2: concat, seed 5, "a dog": 1.0 s',
    ]


def test_cap_and_equalize_belong_to_merges():
    found = setups(parse("cap", "0, 8"), parse("method", "concat, mole, none"), loras=1)
    capped = ModelSetup("concat", "", (1.0,), cap=8.0)
    assert [row[1] for row in found] == [capped, ModelSetup("mole", "", (1.0,)), ModelSetup("none")]
    assert found[0][0] == replace(capped, cap=None)
    assert capped.describe() == "concat, cap 8"
    (row,) = setups(parse("equalize", "0, 0.5"), method="concat")
    assert [setup.equalize for setup in row] == [0, 0.5]
    assert row[1].describe() == "concat, equalize 0.5"
    for kind, text in (("cap", "0.5"), ("cap", "much"), ("equalize", "1.5"), ("equalize", "nan")):
        with pytest.raises(MergeError, match=text):
            parse(kind, text)


def test_a_sweep_varies_method_rank_strength_and_cap_at_once():
    prediction = Prediction("", (0.1,), 0.2, 0.3)
    merges = (("lego", "1x", 1.2), ("concat", "", 0.7), ("calibrated", "2x", 1.0))
    candidates = tuple(Candidate(*merge, prediction, 0.1 * i) for i, merge in enumerate(merges))
    axis = Axis.of_sweep(Sweep(("a",), (1.0,), 8.0, candidates))
    assert axis.values == (
        "lego calibrated 1x, strength x 1.2",
        "concat, strength x 0.7",
        "calibrated 2x, strength x 1",
    )
    (row,) = setups(axis, rank="4", method="svd", loras=1, statistics=True)
    assert row == [
        ModelSetup("lego calibrated", "1x", (1.2,), 8.0),
        ModelSetup("concat", "", (0.7,), 8.0),
        ModelSetup("calibrated", "2x", (1.0,), 8.0),
    ]
    assert axis.title(["a"]) == "sweep"
    assert len(grid(axis, parse("seed", "1, 2"), loras=1, statistics=True)) == 2
    for kind, text in (("method", "lego"), ("strength", "1"), ("cap", "3")):
        with pytest.raises(MergeError, match=f"same setting.*{kind}"):
            grid(axis, parse(kind, text), loras=1, statistics=True)
    assert parse("sweep", "whatever stood here").values == ("",)
