"""`legomole merge --calibrate`."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from legomole.core.formats import load, save
from legomole.core.merge.statistics import Statistics

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from ..hosts.diffusers import tiny_pipelines as tiny
from .command import done, enter_copy, run, squeezed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

WORDS = ("--words", "ember style, burning", "--words", "heart")
MERGE = (
    "merge",
    "style.safetensors:0.8",
    "heart.safetensors",
    "--calibrate",
    "pipe",
    *WORDS,
    "--size",
    "16",
    "--paint-steps",
    "1",
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny.build("SD 1.5")
    pipe.save_pretrained(folder / "pipe")
    for seed, name in ((1, "style"), (2, "heart"), (3, "other")):
        save(tiny.lora(pipe, seed), folder / name, format="diffusers")
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_copy(made, tmp_path, monkeypatch)


def test_one_command_measures_and_merges_and_can_be_repeated():
    text = squeezed(done(*MERGE, "--rank", "2", "-o", "both.safetensors"))
    assert "calibrated: 2 LoRAs" in text
    statistics = Statistics.load("both.statistics.safetensors")
    assert statistics.adapters == tuple(load(f"{name}.safetensors").source.sha256 for name in ("style", "heart"))
    assert {part.rank for part in load("both.safetensors").modules.values()} == {2}
    done("merge", "--config", "both.safetensors", "-o", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("both.safetensors").read_bytes()
    # the file of measurements serves other settings without measuring again
    done("merge", "style.safetensors:0.8", "heart.safetensors", "--method", "lego", "--rank", "2",
         "--statistics", "both.statistics.safetensors", "-o", "lego.safetensors")  # fmt: skip
    assert Path("lego.safetensors").exists()


def test_lego_can_be_calibrated_in_one_command():
    assert "lego: 2 LoRAs" in squeezed(done(*MERGE, "--method", "lego", "--statistics", "s.safetensors", "-o", "l"))
    assert Path("s.safetensors").exists()
    assert "statistics" in squeezed(done("inspect", "l.safetensors", "--recipe"))


def test_nothing_is_measured_for_an_output_that_may_not_be_written():
    Path("both.safetensors").write_bytes(b"precious")
    assert "exists already" in squeezed(run(*MERGE, "-o", "both.safetensors").stderr)
    assert not Path("both.statistics.safetensors").exists()
    assert Path("both.safetensors").read_bytes() == b"precious"
    Path("new.statistics.safetensors").write_bytes(b"precious too")
    assert "exists already" in squeezed(run(*MERGE, "-o", "new.safetensors").stderr)
    assert Path("new.statistics.safetensors").read_bytes() == b"precious too"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("merge", "style.safetensors", "--words", "x", "-o", "o"), "belong to --calibrate"),
        (("merge", "style.safetensors", "heart.safetensors", "--calibrate", "pipe", "--words", "x", "-o", "o"),
         "2 LoRAs and 1 times --words"),
    ],
)  # fmt: skip
def test_wrong_usage_is_an_error(arguments, words):
    result = run(*arguments)
    assert result.exit_code in (2, 3)
    assert words in squeezed(result.stderr)
    assert not Path("o.safetensors").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--method", "svd"), "has no such setting"),
        (("--rank", "many"), "not a rank"),
        (("--set", "lam=-1"), "is negative"),
        (("--density", "0.5"), "has no such setting"),
        (("--device", "warp"), "cannot be used"),
    ],
)
def test_what_the_merge_would_refuse_is_refused_before_measuring(arguments, words):
    result = run(*MERGE, *arguments, "-o", "o")
    assert result.exit_code == 3
    assert words in squeezed(result.stderr)
    assert not Path("o.statistics.safetensors").exists()


def test_it_measures_with_the_weights_of_the_merge():
    text = squeezed(done(*MERGE, "--normalize", "-o", "mean.safetensors"))
    found = Statistics.load("mean.statistics.safetensors")
    assert f"measured {len(found.modules)} layers: mean.statistics.safetensors" in text
    assert found.strengths == pytest.approx([0.8 / 1.8, 1 / 1.8])


def test_a_full_device_is_reported(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nDetails")

    monkeypatch.setattr("legomole.hosts.diffusers.calibration.calibrate_pipeline", full)
    text = squeezed(run(*MERGE, "-o", "o").stderr)
    assert "not enough memory" in text
    assert "a smaller --size" in text
