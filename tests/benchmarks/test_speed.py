"""The speed benchmark at a tiny size: results of its tools, extrapolation, files. Nothing is timed."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legomole.core.formats import load
from legomole.core.lowrank import LowRank
from safetensors.torch import load_file
from torch import Tensor

ROOT = Path(__file__).parents[2]
pytest.importorskip("peft")
pytest.importorskip("sklearn")

if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.speed import inspection, report, sampled, scaling  # noqa: E402
from benchmarks.speed.cases import CASES, PLAIN  # noqa: E402
from benchmarks.speed.click import merge_graph  # noqa: E402
from benchmarks.speed.whole import WHOLE  # noqa: E402

SMOKE = CASES["smoke"]


def delta_of(path: Path, i: int, scale: float) -> Tensor:
    """Delta of a layer in a file written by PEFT's tools."""
    state = load_file(path)
    return (
        scale
        * state[f"base_model.model.layer_{i}.lora_B.weight"].float()
        @ state[f"base_model.model.layer_{i}.lora_A.weight"].float()
    )


def test_the_cases_have_the_layers_of_their_models():
    assert [len(CASES[name].layers) for name in PLAIN] == [722, 722, 304, 304, 224]
    weights = [sum(d_out * d_in for _, d_out, d_in in CASES[name].layers) for name in ("flux-3x16", "llm-3x16")]
    assert 11e9 < weights[0] < 12e9  # Flux has 12 billion
    assert 6.9e9 < weights[1] < 7e9  # the Llama's other weights are embeddings


@torch.no_grad()
def test_the_tools_merge_the_same_files(tmp_path: Path):
    """Concatenation by either library is the exact sum of the LoRAs."""
    paths = SMOKE.write(tmp_path)
    adapters = [load(path) for path in paths]
    for tool in WHOLE:
        WHOLE[tool](SMOKE, paths, tmp_path / f"{tool}.safetensors")
    assert (tmp_path / "floor.safetensors").stat().st_size > 0
    ours = load(tmp_path / "legomole-concat.safetensors")
    for i, (name, _, _) in enumerate(SMOKE.layers):
        wanted = torch.stack([adapter.modules[name].delta() for adapter in adapters]).sum(0)
        torch.testing.assert_close(ours.modules[name].delta(), wanted, rtol=0, atol=2e-4)
        torch.testing.assert_close(delta_of(tmp_path / "peft-cat.safetensors", i, 1.0), wanted, rtol=0, atol=2e-4)


def test_one_layer_of_every_shape_is_timed_and_multiplied(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Three layers of one shape, one of another, which is halved in both dimensions for eight times its time."""
    case = replace(SMOKE, layers=[("a", 8, 8), ("b", 8, 8), ("c", 8, 8), ("d", 32, 16)])
    monkeypatch.setattr(sampled, "_LARGEST", 128)
    monkeypatch.setattr(sampled, "fastest", lambda work: [work(), 1.0][1])
    shapes: list[tuple[int, int]] = []

    def work(units: sampled.Units, rank: int) -> None:
        assert (len(units), rank) == (3, 4)
        shapes.append((units[0].d_out, units[0].d_in))

    assert sampled.per_layer(work)(case, tmp_path).seconds == 3 + 1
    assert sampled.per_layer(work, cubic=True)(case, tmp_path).seconds == 3 + 8
    assert shapes == [(8, 8), (32, 16), (8, 8), (16, 8)]


def test_the_reimplemented_methods_by_hand():
    one, two = (LowRank(torch.tensor([[a, 0.1]]), torch.tensor([[b], [0.1]])) for a, b in ((4.0, 1.0), (2.0, -1.0)))
    A, B = sampled.mergekit_ties([one, two], 1)
    assert A.tolist() == [[3.0, 0.0]]  # equal signs: the mean
    assert B.tolist() == [[0.0], [0.0]]  # 1 - 1 elects no sign
    up, down = sampled.kohya_svd([one], 1)
    assert up.shape == (2, 1)
    assert down.shape == (1, 2)


@torch.no_grad()
def test_the_sampled_tools_run(tmp_path: Path):
    results = {name: tool(SMOKE, tmp_path) for name, tool in sampled.SAMPLED.items()}
    assert all(result.seconds > 0 for result in results.values())
    ratio = results["sklearn-lego"].inertia
    assert ratio is not None
    assert 0.9 < ratio < 1.1


def test_the_table_has_the_ratios(tmp_path: Path):
    results = report.Results("a machine")
    rows = [
        report.Row("smoke", "floor", 2.0, 100, False),
        report.Row("smoke", "legomole-lego", 5.0, 200, False),
        report.Row("smoke", "sklearn-lego", 500.0, 300, True),
    ]
    results.replace("smoke", rows, 0.98)
    results.publish(tmp_path)
    assert "| sklearn-lego (extrapolated) | 500 | 250 | 100 | 300 |" in results.table()
    assert "0.9800" in results.table()
    again = report.Results.load(tmp_path, "a machine")
    assert (again.rows, again.inertia) == (rows, {"smoke": 0.98})
    assert report.Results.load(tmp_path, "another").rows == []
    again.replace("smoke", rows[:1], None)
    assert again.rows == rows[:1]


def test_cases_keep_their_order():
    results = report.Results("a machine")
    for case in ("llm-3x16", "sdxl-3x32", "flux-3x16", "sdxl-3x32"):
        results.replace(case, [report.Row(case, tool, 1.0, 1, False) for tool in ("floor", "legomole-lego")], None)
    assert [row.case for row in results.rows[::2]] == ["sdxl-3x32", "flux-3x16", "llm-3x16"]
    assert [row.tool for row in results.rows[:2]] == ["floor", "legomole-lego"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads a process's memory from /proc")
def test_the_command_writes_its_files(tmp_path: Path):
    command = [sys.executable, "-m", "benchmarks.speed", "--cases", "smoke", "--rounds", "1", "--threads", "1"]
    done = subprocess.run(
        [*command, "--tools", "floor", "legomole-lego", "--out", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found) == {"machine", "rows"}
    assert [row["tool"] for row in found["rows"]] == ["floor", "legomole-lego"]
    assert set(found["rows"][0]) == {"case", "tool", "seconds", "peak_mb", "extrapolated"}
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_one_size_is_varied_at_a_time(tmp_path: Path):
    """Each curve contains the default case, and the file has all points."""
    for curve, values in scaling.CURVES.items():
        default = {"LoRAs": 3, "rank": 16, "layers": 722}
        for value, case in zip(values, scaling.cases(curve, values), strict=True):
            assert {"LoRAs": case.n, "rank": case.rank, "layers": len(case.layers)} == {**default, curve: value}
    scaling.main(["--rounds", "1", "--out", str(tmp_path)], {"layers": (1, 2)})
    assert list(json.loads((tmp_path / "scaling.json").read_text())["layers"]) == ["1", "2"]
    assert (tmp_path / "scaling.png").stat().st_size > 0


def test_inspection_writes_ratios(tmp_path: Path):
    inspection.main(["--case", "smoke", "--rounds", "1", "--out", str(tmp_path)])
    result = json.loads((tmp_path / "inspection.json").read_text())
    assert result["case"] == "smoke"
    assert min(result[part] for part in ("read", "findings", "survey")) >= 0


def test_the_first_click_merges_without_a_model():
    nodes = merge_graph(["a", "b"], 24).nodes
    kinds = sorted(node["class_type"] for node in nodes.values())
    assert kinds == ["LegoMoLE_LegoMerge", "LegoMoLE_LoadLoRA", "LegoMoLE_LoadLoRA", "PreviewAny"]
    merge = nodes["LegoMoLE_LegoMerge0"]["inputs"]
    assert merge["rank"] == "24"
    assert "model" not in merge
