"""Parsers of arguments."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
import typer
from legomole.cli.arguments import parse_input, parse_setting
from legomole.cli.options import DtypeName, FormatName, MethodName
from legomole.core.formats import FORMATS
from legomole.core.merge.methods import METHODS
from legomole.core.recipes.dtype_names import DTYPES, SHORT_NAMES, full_dtype_name


@pytest.mark.parametrize(
    ("text", "entry"),
    [
        ("a.st", {"path": "a.st"}),
        ("a.st:0.8", {"path": "a.st", "weight": 0.8}),
        ("a.st:-1:.5", {"path": "a.st", "weight": -1.0, "text_encoder_weight": 0.5}),
        ("C:\\loras\\a.st", {"path": "C:\\loras\\a.st"}),
        ("C:\\loras\\a.st:0.8", {"path": "C:\\loras\\a.st", "weight": 0.8}),
        ("C:/loras/a.st:0.8:1", {"path": "C:/loras/a.st", "weight": 0.8, "text_encoder_weight": 1.0}),
        ("D:a.st", {"path": "D:a.st"}),
        ("dir:1/a.st", {"path": "dir:1/a.st"}),
    ],
)
def test_weights_after_colons(text, entry):
    assert parse_input(text) == entry


def test_a_file_whose_name_ends_like_a_weight_is_that_file():
    Path("v:2").write_bytes(b"")
    assert parse_input("v:2") == {"path": "v:2"}
    assert parse_input("v:2:3") == {"path": "v:2", "weight": 3.0}


def test_settings():
    assert parse_setting("joint-scale = 1.2") == ("joint_scale", "1.2")
    for parse, text in ((parse_input, "ab:c"), (parse_setting, "=1")):
        with pytest.raises(typer.BadParameter):
            parse(text)


def test_the_choices_are_those_of_the_tables():
    """The command line names them itself so that --help needs no torch."""
    assert list(get_args(MethodName)) == list(METHODS)
    assert set(get_args(FormatName)) == set(FORMATS)
    assert all(getattr(torch, full_dtype_name(name)).is_floating_point for name in get_args(DtypeName))
    assert set(get_args(DtypeName)) == {*DTYPES, *SHORT_NAMES}
