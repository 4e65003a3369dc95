"""The GPU benchmark at a small size, on a fake GPU that refuses tensors of the CPU. Nothing is timed."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from ..fake_gpu import fake_gpu

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks are not in the package; last, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.gpu import __main__ as gpu  # noqa: E402
from benchmarks.gpu import models, parts  # noqa: E402


def run(out: Path, *arguments: str) -> dict[str, Any]:
    gpu.main(["--size", "small", "--rounds", "1", "--out", str(out), *arguments])
    return json.loads((out / "results.json").read_text())


@pytest.mark.parametrize("part", parts.PARTS)
def test_each_part_runs_on_the_device_and_gives_the_values_of_the_cpu(tmp_path: Path, part: str):
    """Operations on tensors of both devices raise. The fake GPU computes what a CPU does, so differences are tiny."""
    with fake_gpu():
        results = run(tmp_path, "--parts", part)
    assert results["device"].startswith("fake GPU")
    rows = results["parts"][part]["rows"]
    differences = [row["largest_difference"] for row in rows if "largest_difference" in row]
    errors = [row["error"] for row in rows if "error" in row]
    if part == "mixing":
        assert {row["model"] for row in rows} == {"sdxl", "flux", "llama", "llama, one token"}
        assert len(errors) == 2 + 2 + 3 + 3
        assert max(errors) < 0.1  # the merged weights are rounded to bfloat16
    else:
        assert differences
        assert max(differences) < 1e-4
    assert all(math.isfinite(value) for row in rows for value in row.values() if isinstance(value, float))


def test_parts_with_results_are_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    calls: list[str] = []

    def part(name: str, rows: list[dict[str, Any]]):
        def call(run: parts.Run):
            calls.append(name)
            yield from rows

        return call

    def interrupted(run: parts.Run):
        calls.append("mixing")
        raise KeyboardInterrupt
        yield {}

    for name in ("merging", "calibration", "training"):
        monkeypatch.setitem(parts.PARTS, name, part(name, [{"seconds": 1.0}]))
    monkeypatch.setitem(parts.PARTS, "mixing", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--device", "cpu")
    monkeypatch.setitem(parts.PARTS, "mixing", part("mixing", []))
    results = run(tmp_path, "--device", "cpu")
    assert calls == ["merging", "calibration", "training", "mixing", "mixing"]
    assert results["parts"]["training"]["rows"] == [{"seconds": 1.0}]
    run(tmp_path, "--device", "cpu", "--parts", "merging", "--again")
    assert calls[5:] == ["merging"]
    monkeypatch.setattr(gpu, "describe", lambda device: "another GPU")
    assert set(run(tmp_path, "--device", "cpu", "--parts", "merging")["parts"]) == {"merging"}


def test_the_models_have_the_layers_of_the_real_ones():
    """Weights of the adapted layers: those of SDXL's transformer blocks, and a quarter of Flux's and of Llama's."""
    size, meta = models.SIZES["full"], torch.device("meta")
    weights: dict[str, float] = {}
    for kind in ("sdxl", "flux", "llama"):
        layers = models.adapted_layers(models.build(kind, size, meta, torch.bfloat16))
        weights[kind] = sum(layer.weight.numel() for layer in layers.values()) / 1e9  # type: ignore[operator,union-attr]
        if kind == "sdxl":
            linear = [name for name, layer in layers.items() if isinstance(layer, torch.nn.Linear)]
            assert len(linear) == 722
    assert 2.3 < weights["sdxl"] < 2.6
    assert 1.5 < weights["llama"] == pytest.approx(7 / 4, rel=0.02)
    assert weights["flux"] == pytest.approx((19 * 24 + 38 * 12) * 3072**2 / 4 / 1e9, rel=0.06)
