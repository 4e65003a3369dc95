"""The report as data, totals and text. Numbers by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from legomole.core.merge.report import MANY, MergeReport, ModuleReport


def module(name="m", adapters=(0, 1), norms=(3.0, 4.0), cosine=0.0, error=0.0, clusters=(), rank_out=2) -> ModuleReport:
    n = len(adapters)
    table = tuple(tuple(1.0 if i == j else cosine for j in range(n)) for i in range(n))
    return ModuleReport(name, tuple(adapters), (2,) * n, rank_out, tuple(norms), table, error, clusters)


def report(*modules: ModuleReport, **kw) -> MergeReport:
    inputs = kw.pop("inputs", ("style", "subject"))
    return MergeReport(inputs, tuple(1.0 for _ in inputs), "lego", modules, **kw)


@pytest.mark.parametrize(("error", "kept"), [(0.0, 1.0), (0.5, 0.75), (1.0, 0.0), (2.0, 0.0)])
def test_energy_kept_is_one_minus_the_squared_error(error, kept):
    """A result twice as far away as nothing at all keeps no energy; it does not keep -300%."""
    assert module(error=error).energy_kept == kept


def test_total_energy_weighs_modules_by_their_size():
    """Sizes 3^2 + 4^2 = 25 and 0^2 + 5^2 = 25 (kept 1 and 0.75): the mean, 0.875. A silent module counts nothing."""
    silent = module("z", norms=(0.0, 0.0), error=1.0)
    assert report(module("a"), module("b", norms=(0.0, 5.0), error=0.5), silent).energy_kept == pytest.approx(0.875)


def test_overlap_weighs_modules_by_the_product_of_norms():
    """Products 12 (cosine 0.5) and 4 (cosine -0.5): (6 - 2) / 16 = 0.25. Modules not shared do not count."""
    shared = [module("a", cosine=0.5), module("b", norms=(2.0, 2.0), cosine=-0.5)]
    alone = module("c", adapters=(1,), norms=(9.0,))
    assert report(*shared, alone).overlap() == [[1.0, 0.25], [0.25, 1.0]]


def test_overlap_of_adapters_that_share_nothing_is_zero():
    both = report(module("a", adapters=(0,), norms=(1.0,)), module("b", adapters=(1,), norms=(1.0,)))
    assert both.overlap() == [[1.0, 0.0], [0.0, 1.0]]


def test_mixed_clusters_is_the_share_fed_by_several():
    """Clusters (2, 0), (1, 1), (0, 1), (3, 2): two of four blend both adapters."""
    clusters = ((2, 0), (1, 1), (0, 1), (3, 2))
    assert report(module(clusters=clusters)).mixed_clusters() == 0.5
    assert report(module()).mixed_clusters() is None


def test_ranks_out_is_the_range():
    assert report(module("a", rank_out=3), module("b", rank_out=8)).ranks_out == (3, 8)
    assert report().ranks_out == (0, 0)


@pytest.mark.parametrize(
    ("cosine", "words"),
    [
        (0.95, "nearly the same LoRA"),
        (0.5, "they share a direction"),
        (0.0, "unrelated"),
        (-0.5, "they work against each other"),
    ],
)
def test_text_says_what_an_overlap_means(cosine, words):
    assert f"overlap [1] and [2]: {cosine:+.3f} ({words})" in report(module(cosine=cosine)).text()


def test_text_lists_everything_that_was_not_merged():
    text = report(
        module(rank_out=4, error=0.1),
        passed_on=tuple(f"k{i}" for i in range(25)),
        dropped=("emb of subject: it cannot be added",),
        notes=("read me",),
    ).text()
    assert text.startswith("lego: 2 LoRAs, 1 modules, merged rank 4, 99.0% of the sum's energy kept")
    assert "[1] style: weight 1, 1 modules, size 3" in text
    assert "passed on (25):" in text
    assert "and 5 more" in text
    assert "DROPPED (1):\n    emb of subject: it cannot be added" in text
    assert text.endswith("note: read me")


def test_to_dict_survives_json():
    data = json.loads(json.dumps(report(module(clusters=((1, 1),)), notes=("n",)).to_dict()))
    assert data["modules"][0]["clusters"] == [[1, 1]]
    assert data["overlap"] == [[1.0, 0.0], [0.0, 1.0]]
    assert math.isclose(data["energy_kept"], 1.0)
    assert data["notes"] == ["n"]


def many(n: int = MANY + 1) -> MergeReport:
    """Adapters that do not overlap, but for the 3rd and the 5th at -0.5, and the 2nd and the 4th at 0.4."""
    row = replace(module(adapters=range(n), norms=[1.0] * n), clusters=((1, *[0] * (n - 2), 2),))
    table = [list(line) for line in row.cosine]
    table[2][4] = table[4][2] = -0.5
    table[1][3] = table[3][1] = 0.4
    return report(replace(row, cosine=tuple(map(tuple, table))), inputs=tuple(f"lora{i + 1}" for i in range(n)))


def test_of_many_adapters_the_pairs_that_overlap_most_are_listed():
    lines = [line.strip() for line in many().text().splitlines() if "overlap" in line]
    assert lines[:3] == [
        "overlap [3] and [5]: -0.500 (they work against each other)",
        "overlap [2] and [4]: +0.400 (they share a direction)",
        "overlap [1] and [2]: +0.000 (unrelated)",
    ]
    assert lines[20:] == ["116 more pairs overlap less (all of them in the JSON report)"]  # of 17 * 16 / 2 = 136


def test_of_many_adapters_the_json_has_the_total_of_every_pair():
    data = many().to_dict()
    assert data["overlap"][4][2] == -0.5
    assert data["modules"][0]["cosine"] == ()
    assert many(MANY).to_dict()["modules"][0]["cosine"][4][2] == -0.5
