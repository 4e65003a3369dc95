"""`legomole inspect`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import legomole
import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank
from safetensors.torch import save_file

from .command import NAMES, done, run, squeezed, write


def test_inspect_shows_the_contents():
    text = squeezed(done("inspect", "a.safetensors"))
    assert "format kohya" in text
    assert "base model sd_v1" in text
    assert "modules 4" in text
    assert "ranks 4" in text


def test_inspect_modules_prints_names_alone():
    assert done("inspect", "--modules", "a.safetensors").split() == sorted(NAMES)


def test_inspect_shows_metadata_on_one_line():
    write(Path("c.safetensors"), note='{\n  "a": 1\n}')
    assert '· note { "a": 1 }' in squeezed(done("inspect", "c.safetensors"))


def test_inspect_works_on_files_that_cannot_be_merged():
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, "lokr.safetensors")
    assert "lokr_w1" in done("inspect", "lokr.safetensors")


def test_inspect_of_a_merged_file_shows_the_merge():
    done("merge", "a.safetensors:0.5", "b.safetensors", "-o", "out.safetensors")
    text = squeezed(done("inspect", "out.safetensors"))
    assert "merged from a.safetensors:0.5, b.safetensors:1" in text
    assert f"merged by legomole {legomole.__version__}, lego" in text


@pytest.mark.parametrize("name", ["report.png", "report.html"])
def test_inspect_plots_a_report(name):
    text = done("inspect", "a.safetensors", "b.safetensors", "--plot", name)
    assert "LEGO at rank 3 keeps" in text
    assert f"wrote {name}" in text
    first = Path(name).read_bytes()
    assert first.startswith(b"\x89PNG\r\n\x1a\n" if name.endswith("png") else b"<!doctype html>")
    assert sorted(path.name for path in Path().iterdir()) == ["a.safetensors", "b.safetensors", name]
    text = done("inspect", "a.safetensors", "b.safetensors", "--plot", name, "--overwrite", "--rank", "2")
    assert "LEGO at rank 2 keeps" in text
    assert Path(name).read_bytes() != first
    data = json.loads(done("inspect", "a.safetensors", "--plot", name, "--overwrite", "--json"))
    assert data["plot"] == name
    assert data["summary"] == ["Rank 3 keeps 97% of its energy; all of it needs rank 4."]


def test_inspect_does_not_plot_over_files():
    Path("report.html").write_text("precious")
    for arguments, code in (
        (["--plot", "report.html"], 4),
        (["--plot", "gone/report.html"], 4),
        (["--plot", "a.safetensors", "--overwrite"], 2),
        (["--plot", "x.png", "--recipe"], 2),
        (["--rank", "4"], 2),
        (["--plot", "x.png", "--rank", "no"], 3),
    ):
        assert run("inspect", "a.safetensors", *arguments).exit_code == code
    assert Path("report.html").read_text() == "precious"
    assert not Path("x.png").exists()


def test_inspect_says_what_it_draws_with(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    result = run("inspect", "a.safetensors", "--plot", "x.png")
    assert result.exit_code == 3
    assert "legomole[plots]" in squeezed(result.output)


def test_inspect_of_several_files_shows_their_overlap():
    """A LoRA overlaps fully with itself."""
    write(Path("twin.safetensors"), 4, 1)
    data = json.loads(done("inspect", "--json", "a.safetensors", "twin.safetensors"))
    assert data["overlap"]["pairs"][0]["shared_modules"] == 4
    assert data["overlap"]["pairs"][0]["cosine"] == pytest.approx(1.0)
    assert "+1.000" in done("inspect", "a.safetensors", "twin.safetensors")


def test_a_closed_pipe_is_no_bug():
    env = os.environ | {"PYTHONSAFEPATH": "1"}
    for option in ("--modules", "--json"):
        command = [sys.executable, "-m", "legomole", "inspect", option, "a.safetensors"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env) as started:
            assert started.stdout is not None
            assert started.stderr is not None
            started.stdout.close()  # long before anything is written
            assert started.stderr.read() == b""
        assert started.returncode == 141


def spiked(path: Path, seed: int = 0) -> Path:
    """A random LoRA whose first layer has its first unit 20 times as large."""
    g = torch.Generator().manual_seed(seed)
    modules: dict[str, LowRank] = {}
    for i, name in enumerate(NAMES):
        A, B = torch.randn(4, 64, generator=g), torch.randn(64, 4, generator=g)
        if i == 0:
            A[0] *= 20
        modules[name] = LowRank(A, B)
    return save(Adapter(modules), path, format="kohya")


def test_inspect_lists_findings():
    spiked(Path("s.safetensors"))
    spiked(Path("copy.safetensors"))
    data = json.loads(done("inspect", "s.safetensors", "copy.safetensors", "--json"))
    assert [(f["kind"], f["loras"]) for f in data["findings"]] == [
        ("spike", ["s"]),
        ("spike", ["copy"]),
        ("duplicate", ["s", "copy"]),
    ]
    assert list(data["findings"][0]) == ["kind", "loras", "layers", "value", "threshold", "text", "remedy"]
    assert data["findings"][0]["layers"] == [NAMES[0]]
    assert data["findings"][0]["value"] > data["findings"][0]["threshold"] == 8.1
    text = squeezed(done("inspect", "s.safetensors", "copy.safetensors"))
    assert "● s: red" in text
    assert "fault: s has a spectral spike" in text
    assert "To do: merge or convert it with cap 8" in text


def test_inspect_of_one_lora_has_findings_unless_it_cannot_be_merged():
    assert json.loads(done("inspect", str(spiked(Path("s.safetensors"))), "--json"))["findings"][0]["kind"] == "spike"
    save_file({"lora_unet_x.lokr_w1": torch.ones(2, 2), "lora_unet_x.lokr_w2": torch.ones(2, 2)}, "lokr.safetensors")
    data = json.loads(done("inspect", "lokr.safetensors", "--json"))
    assert "findings" not in data
    assert "LoKr" in data["findings_missing"]
    assert "no findings, because the LoRA cannot be merged" in done("inspect", "lokr.safetensors")


def test_inspect_finds_nan_and_shows_the_rest():
    modules = {name: LowRank(torch.eye(4, 8) * (i or float("nan")), torch.eye(6, 4)) for i, name in enumerate(NAMES)}
    save_file({f"{n}.lora_down.weight": p.A for n, p in modules.items()}
              | {f"{n}.lora_up.weight": p.B for n, p in modules.items()}, "nan.safetensors")  # fmt: skip
    for arguments in (("nan.safetensors",), ("nan.safetensors", "nan.safetensors", "--plot", "report.html")):
        (finding, *_) = json.loads(done("inspect", *arguments, "--json"))["findings"]
        assert (finding["kind"], finding["layers"]) == ("not_finite", [NAMES[0]])
    assert "NaN or infinite numbers in 1 layer (" in Path("report.html").read_text()


def test_inspect_compares_with_the_base_model():
    spiked(Path("s.safetensors"))
    g = torch.Generator().manual_seed(1)
    base = {name.removeprefix("lora_unet_").replace("_to_", ".to_"): torch.randn(64, 64, generator=g) for name in NAMES}
    save_file({f"{name}.weight": W for name, W in base.items()}, "base.safetensors")
    data = json.loads(done("inspect", "s.safetensors", "--base", "base.safetensors", "--json"))
    assert "larger_than_weights" in [finding["kind"] for finding in data["findings"]]
