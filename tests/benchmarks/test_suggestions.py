"""Tables of the suggestions benchmark, by hand, and the spike that it puts into LoRAs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")

if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from legomole.core.formats import load  # noqa: E402
from legomole.nano.store import Store  # noqa: E402

from benchmarks.nano import spikes, suggestions  # noqa: E402
from benchmarks.nano.evaluate import TUNING, Bench  # noqa: E402


def candidate(merge: str, strength: float, joint: float, place: int) -> dict:
    return {"merge": merge, "strength": strength, "joint": joint, "place": place}


def result(seed: int, *sums: float, others: tuple[float, ...] = ()) -> dict:
    candidates = [
        candidate("concat", s, joint, place) for place, (s, joint) in enumerate(zip((1.2, 1, 0.7), sums, strict=True))
    ]
    candidates += [candidate("svd 1x", 1 + i, joint, 3 + i) for i, joint in enumerate(others)]
    return {
        **{"concepts": ("heart", "ember"), "seed": seed, "tuning": False, "candidates": candidates},
        **{"weights": {"joint": sums[1]}, "account": {"joint": sums[0]}},
    }


def test_the_table_says_how_much_of_the_way():
    """From 0.25 at strength 1 to 0.75 at the best of every set; the account's 0.5 are half of the way."""
    rows = [result(0, 0.5, 0.0, 1.0), result(1, 0.5, 0.5, 0.25, others=(0.0, 0.75, 1.0))]
    lines = suggestions.table(rows).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[0] for row in cells[:4]] == [
        "sum, strength 1", "sum, suggested from the weights", "sum, suggested from the account",
        "sum, the best of four strengths",
    ]  # fmt: skip
    assert [row[1] for row in cells] == ["2"] * 4 + ["1"] * 4
    assert [row[2].split()[0] for row in cells[:4]] == ["0.25", "0.25", "0.50", "0.75"]
    assert [row[4] for row in cells[:4]] == ["", "0%", "50%", "100%"]
    assert [row[2].split()[0] for row in cells[4:]] == ["0.50", "0.50", "0.75", "1.00"]


def test_only_two_strengths_of_a_merge_get_a_picture():
    row = result(0, 0.1, 0.2, 0.3, others=(0.4, 0.5, 0.6))
    assert [c["joint"] for c in suggestions._six(row)] == [0.1, 0.2, 0.4, 0.5]


def test_all_pairs_are_measured_once_and_the_tuning_sets_first():
    assert len(set(suggestions.SETS)) == len(suggestions.SETS) == 36
    assert suggestions.SETS[:4] == TUNING


def test_a_spike_multiplies_the_largest_singular_value():
    before = load(Store().lora("heart", 0))
    after = spikes.with_spike(before)
    values = [torch.linalg.svdvals(adapter.modules[spikes.LAYER].delta().double())[:4] for adapter in (before, after)]
    torch.testing.assert_close(values[1], values[0] * torch.tensor([20.0, 1, 1, 1]).double(), rtol=1e-4, atol=1e-6)
    assert {name for name, part in after.modules.items() if part is not before.modules[name]} == {spikes.LAYER}


def test_spikes_are_averaged_by_method():
    rows = [{"method": "sum", **dict.fromkeys(spikes.CASES, score), "spiked": 0.0} for score in (0.25, 0.75)]
    assert "| sum | 2 | 0.50 | 0.00 | 0.50 | 0.50 |" in spikes.table(rows)


def test_suggestions_of_a_real_set(tmp_path: Path):
    """Without pictures: the LoRAs hardly overlap, so that weights alone change nothing, and joint prompts want 1.2."""
    bench = Bench(Store(), tmp_path / "rows.jsonl", lambda _: None)
    loras = bench.loras(("heart", "ember"), 0)
    assert suggestions.suggested(loras, measured=False) == pytest.approx((1, 1), abs=0.01)
    assert suggestions.suggested(loras, measured=True) == pytest.approx((1.2, 1.2), abs=0.01)
    first, *_ = suggestions.swept(loras).candidates
    assert (first.method, first.strength) == ("concat", 1.2)
