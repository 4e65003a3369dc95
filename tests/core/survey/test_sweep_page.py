"""Files of a sweep: the table as CSV, the chart, and a page in which names are escaped."""

from __future__ import annotations

import csv

import pytest
from legomole.core.errors import SaveError
from legomole.core.merge.account import Prediction
from legomole.core.recipes.sweep import Candidate, Sweep
from legomole.core.survey.sweep_page import ENDINGS, write_sweep

pytest.importorskip("PIL")

CANDIDATES = (
    Candidate("calibrated", "2x", 1.2, Prediction("", (0.25, None), 0.5, 0.75), 0.125),
    Candidate("concat", "", 1.0, Prediction("", (0.5, 0.5), 0.0, 1.0), 0.25),
)
SWEPT = Sweep(("<b>a, b</b>", "c"), (0.5, 1.0), 8.0, CANDIDATES, ("cap 8: a spike & more",))


def test_the_table_as_csv(tmp_path):
    path = tmp_path / "s.csv"
    write_sweep(SWEPT, path)
    head, first, second = csv.reader(path.read_text().splitlines())
    assert head == ["merge", "strength", "predicted", "[1] <b>a, b</b>", "[2] c", "joint", "base"]
    assert first == ["calibrated 2x", "1.2", "0.125", "0.25", "-", "0.50", "0.75"]
    assert second[0] == "concat"


def test_the_chart_and_the_page(tmp_path):
    write_sweep(SWEPT, tmp_path / "s.png")
    assert (tmp_path / "s.png").read_bytes().startswith(b"\x89PNG")
    write_sweep(SWEPT, tmp_path / "S.HTML")
    page = (tmp_path / "S.HTML").read_text()
    assert "<td class=name>calibrated 2x</td><td>1.2</td><td>0.125</td>" in page
    assert "cap 8: a spike &amp; more" in page
    assert "&lt;b&gt;a, b&lt;/b&gt;: weight 0.5" in page
    assert "<b>" not in page
    assert page.count("data:image/png;base64,") == 1


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_folder_that_is_missing(tmp_path, ending):
    with pytest.raises(SaveError):
        write_sweep(SWEPT, tmp_path / "nowhere" / f"s{ending}")
