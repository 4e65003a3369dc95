"""From axes to cells, by hand: what is in which cell, which are alike, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
from legomole.core.errors import MergeError
from legomole.core.merge.methods import METHODS
from legomole.core.pictures.grid import AXES, CHOICES, Axis, Cell, Setup, account, cells, groups

ONE = Axis("nothing", ("",))


def grid(x: Axis, y: Axis = ONE, **settings: Any) -> list[list[Cell]]:
    defaults = {"method": "lego", "rank": "1x", "seed": 5, "prompt": "a cat", "loras": 2, "statistics": False}
    return cells(x, y, **{**defaults, **settings})


def setups(*args: Any, **settings: Any) -> list[list[Setup]]:
    return [[cell.setup for cell in row] for row in grid(*args, **settings)]


def read(kind: str, text: str) -> Axis:
    return Axis.read("x", kind, text)


def test_values_are_separated_by_commas_or_lines_and_prompts_by_lines():
    assert read("method", " none, svd ,lego\nmole,").values == ("none", "svd", "lego", "mole")
    assert read("prompt", "a cat, sitting\n\n a dog ").values == ("a cat, sitting", "a dog")
    assert read("nothing", "left over").values == ("",)


def test_methods_across_ranks_down():
    """A method without a rank is the same in every row, and so is the plain model."""
    found = setups(read("method", "none, concat, svd, mole"), read("rank", "8, auto"))
    even = (1.0, 1.0)
    assert found == [
        [Setup("none"), Setup("concat", "", even), Setup("svd", "8", even), Setup("mole", "", even)],
        [Setup("none"), Setup("concat", "", even), Setup("svd", "95%", even), Setup("mole", "", even)],
    ]


def test_strengths_multiply():
    """All LoRAs by the column, the second also by the row; all at 0 is the plain model."""
    found = setups(read("strength", "0, 0.5, 2"), read("strength 2", "0, 3"), method="concat")
    assert found == [
        [Setup("none"), Setup("concat", "", (0.5, 0.0)), Setup("concat", "", (2.0, 0.0))],
        [Setup("none"), Setup("concat", "", (0.5, 1.5)), Setup("concat", "", (2.0, 6.0))],
    ]


def test_seeds_and_prompts_do_not_change_what_is_on_the_model():
    found = grid(read("seed", "1, 18446744073709551615"), read("prompt", "a cat\na dog"))
    setup = Setup("lego", "1x", (1.0, 1.0))
    assert found[1] == [Cell(setup, 1, "a dog"), Cell(setup, 2**64 - 1, "a dog")]
    assert groups(found) == {setup: [*found[0], *found[1]]}


def test_equal_cells_are_grouped_once_in_order():
    found = grid(read("method", "svd, none, svd"), read("rank", "auto, 95.0%"))
    assert groups(found) == {found[0][0].setup: [found[0][0]], Setup("none"): [found[0][1]]}


def test_what_the_axes_do_not_change_is_the_widgets():
    assert grid(ONE, method="svd", rank="16") == [[Cell(Setup("svd", "16", (1.0, 1.0)), 5, "a cat")]]
    assert setups(read("method", "none"), loras=0, rank="not used") == [[Setup("none")]]


def test_every_method_can_be_chosen_and_knows_what_it_needs():
    assert set(CHOICES) == {*METHODS, "none", "mole", "lego calibrated"}
    found = setups(read("method", ", ".join(CHOICES)), statistics=True)[0]
    assert {setup.method for setup in found if setup.calibrated} == {"calibrated", "lego calibrated"}
    assert {setup.method for setup in found if not setup.rank} == {"none", "mole", "concat", "linear"}
    assert {setup.row for setup in found if setup.merges} == set(METHODS)
    assert AXES[:4] == ("method", "rank", "strength", "strength 1")


@pytest.mark.parametrize(
    ("kind", "text", "words"),
    [
        ("method", "lego, magic", ("no such method", "x axis", "magic", "mole")),
        ("rank", "8, 0x", ("not a rank", "x axis", "0x")),
        ("strength", "1, nan", ("not a strength", "x axis", "nan")),
        ("strength 2", "loud", ("not a strength", "loud")),
        ("seed", "1.5", ("not a seed", "1.5")),
        ("seed", "18446744073709551616", ("not a seed",)),
        ("prompt", " \n ", ("The x axis has no values.", "one a line", "x_values")),
    ],
)
def test_wrong_values_are_refused(kind, text, words):
    with pytest.raises(MergeError) as error:
        read(kind, text)
    for word in words:
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("axes", "settings", "words"),
    [
        ((Axis("seed", ("1",)), Axis("seed", ("2",))), {}, "Both axes change the same: seed."),
        ((Axis("strength 3", ("1",)),), {}, "a LoRA that is not there"),
        ((ONE,), {"loras": 0}, "No LoRA is connected, and lego needs some."),
        ((Axis("method", ("mole",)),), {"loras": 0}, "and mole needs some"),
        ((ONE,), {"method": "lego calibrated"}, "The method lego calibrated needs statistics."),
        ((ONE,), {"rank": "many"}, "This is not a rank."),
    ],
)
def test_grids_that_cannot_be_are_refused(axes, settings, words):
    with pytest.raises(MergeError, match=words):
        grid(*axes, **settings)


def test_titles_name_the_lora():
    labels = ["ember", "heart"]
    assert [read(kind, "1").title(labels) for kind in ("strength", "strength 2", "nothing")] == [
        "strength",
        "strength 2 (heart)",
        "",
    ]


def test_the_account_says_each_cell_once():
    found = grid(read("method", "none, svd, none"), read("strength 1", "1, 0.5"))
    first, svd, weak = found[0][0], found[0][1], found[1][1]
    text = account(found, {first: 2.0, svd: 1.25, weak: 1.0}, {svd.setup: "merged in 0.1 s"})
    assert text.splitlines() == [
        "6 cells, 3 painted in 4.2 s",
        "  row 1, column 1: none, seed 5: 2.0 s",
        "  row 1, column 2: svd, rank 1x, seed 5: 1.2 s; merged in 0.1 s",
        "  row 1, column 3: the same as row 1, column 1",
        "  row 2, column 1: the same as row 1, column 1",
        "  row 2, column 2: svd, rank 1x, strengths x 0.5, 1, seed 5: 1.0 s",
        "  row 2, column 3: the same as row 1, column 1",
    ]


def test_the_account_tells_prompts_where_there_are_several():
    found = grid(read("prompt", "a cat\na dog"), method="concat")
    text = account(found, dict.fromkeys(found[0], 1.0), {found[0][0].setup: "whole"})
    assert text.splitlines() == [
        "2 cells, 2 painted in 2.0 s",
        '  row 1, column 1: concat, seed 5, "a cat": 1.0 s; whole',
        '  row 1, column 2: concat, seed 5, "a dog": 1.0 s',
    ]
