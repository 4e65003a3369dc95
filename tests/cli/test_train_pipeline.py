"""`legomole train-gates` on a pipeline, and what `inspect` prints of its files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import legomole
from legomole.cli.gates_input import read_pictures
from legomole.core.errors import FormatError
from legomole.core.formats import save
from legomole.core.formats.files import read_tensors, write_tensors
from legomole.core.mole.router import concepts_in, route_gates, route_mean_gates
from legomole.core.mole.trained import TrainedGates
from legomole.core.train import fit_detector
from legomole.hosts.diffusers.denoiser import PipelinePromptEncoder
from legomole.hosts.diffusers.layer_names import to_kohya
from PIL import Image

from ..hosts.diffusers import tiny_pipelines as tiny
from .command import done, enter_copy, run, squeezed

# the libraries' own affairs
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

LORAS = ("style.safetensors:0.8", "heart.safetensors")
WORDS = ("--words", "ember style, burning", "--words", "heart")
SMALL = (
    *("--size", "16", "--paint-steps", "1", "--batch", "8", "--lr", "0.1"),
    *("--set", "examples=16", "--set", "samples=12", "--set", "warmup=1"),
)
TRAIN = ("train-gates", "pipe", *LORAS, *WORDS, *SMALL)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline folder and LoRA files: one of each dialect, one for another architecture."""
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny.build("SD 1.5")
    pipe.save_pretrained(folder / "pipe")
    save(to_kohya(tiny.lora(pipe, 1)), folder / "style", format="kohya")
    save(tiny.lora(pipe, 2), folder / "heart", format="diffusers")
    save(tiny.lora(tiny.build("Flux"), 1), folder / "flux", format="diffusers")
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    enter_copy(made, tmp_path, monkeypatch)
    return tmp_path


def test_a_pipeline_of_the_local_cache_may_have_a_revision(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "cache" / "models--me--pipe"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cached.parent))
    for commit, branch in (("1" * 40, "main"), ("2" * 40, "v1")):
        shutil.copytree(made / "pipe", cached / "snapshots" / commit)
        (cached / "refs").mkdir(exist_ok=True)
        (cached / "refs" / branch).write_text(commit)
    (cached / "snapshots" / ("1" * 40) / "unet" / "config.json").unlink()  # only v1 can be loaded
    arguments = ("train-gates", "me/pipe@v1", *LORAS, *WORDS, "--objective", "router", *SMALL, "-o", "gates")
    assert "DiffusionPipeline.from_pretrained('me/pipe', revision='v1')" in done(*arguments)
    result = run("train-gates", "me/pipe", *arguments[2:], "--overwrite")
    assert (result.exit_code, "The pipeline cannot be loaded" in squeezed(result.output)) == (3, True)
    calibrate = ("merge", "style.safetensors", "heart.safetensors", *WORDS, "--size", "16", "-o", "both")
    done(*calibrate, "--base", "me/pipe@v1")
    result = run(*calibrate, "--overwrite", "--base", "me/pipe@../v1")
    assert (result.exit_code, "no branch, tag or commit" in squeezed(result.output)) == (3, True)


def test_training_writes_gates_and_says_how_to_use_them(folder: Path) -> None:
    text = done(*TRAIN, "--steps", "12", "--plot", "plot", "-o", "gates")
    trained = TrainedGates.load("gates.safetensors")
    losses = trained.training["losses"]
    assert len(losses) == 12
    assert "distil on UNet2DConditionModel: 8 gates, 35 prompts, 12 steps" in text
    assert f"{losses[0]:.4g} to {losses[-1]:.4g}" in text
    assert "style and heart (6)" in text
    assert "wrote gates.safetensors" in text
    with Image.open("plot.png") as plot:
        assert plot.width > 100
    # the printed lines do what they say
    code = text.split("To use them:\n\n")[1]
    assert "strengths=[0.8, 1]" in code
    before = diffusers.StableDiffusionPipeline.__call__

    def small(self: Any, prompt: str) -> Any:
        assert "forward" in self.unet.__dict__  # the mixture is on
        assert prompt == "ember style, heart"
        return before(self, prompt, height=16, width=16, num_inference_steps=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(diffusers.StableDiffusionPipeline, "__call__", small)
        found: dict[str, Any] = {}
        exec(code, found)
    assert found["image"].size == (16, 16)
    assert found["mixture"].gates.names == trained.gates.names


def test_inspect_shows_gates() -> None:
    done(*TRAIN, "--steps", "2", "--granularity", "block", "-o", "gates")
    text = squeezed(done("inspect", "gates.safetensors"))
    trained = TrainedGates.load("gates.safetensors")
    sha256 = legomole.load("style.safetensors").source.sha256
    assert f"LoRA style:0.8, sha256 {sha256[:12]}.., named by ember style, burning" in text
    assert "gates per block, sigmoid, read text" in text
    assert "base model UNet2DConditionModel" in text
    assert "trained by distil (steps 2, batch 8" in text
    data = json.loads(done("inspect", "--json", "gates.safetensors", "style.safetensors", "heart.safetensors"))
    assert data["files"][0]["loss"] == [trained.training["losses"][0], trained.training["losses"][-1]]
    assert data["files"][0]["format"] == "gates"
    assert [file["format"] for file in data["files"][1:]] == ["kohya", "diffusers"]
    assert len(data["overlap"]["pairs"]) == 1


def test_json_is_all_there_is() -> None:
    data = json.loads(done(*TRAIN, "--steps", "2", "--json", "-o", "gates"))
    assert (data["base"], data["steps"], data["prompts"]) == ("UNet2DConditionModel", 2, 35)
    assert [row["named"] for row in data["weights"]] == [["style"], ["heart"], ["style", "heart"], []]
    assert set(data["weights"][0]["mean"]) == {"style", "heart"}
    error = json.loads(run(*TRAIN, "--json", "-o", "gates").stdout)
    assert (error["exit_code"], error["error"]["problem"]) == (4, "The output exists already.")


def test_every_option_reaches_the_training() -> None:
    options = "--granularity network --activation softmax-null --reads hidden --balance 0.5 --seed 3 --checkpointing"
    Path("prompts.txt").write_text("a heart on fire, burning\n\nheart\nember style\n", encoding="utf-8")
    # one gate for the whole network that reads its first layer cannot be trained with checkpointing
    result = run(*TRAIN, *options.split(), "-o", "gates")
    assert result.exit_code == 3
    assert "cannot be trained with checkpointing" in squeezed(result.output)
    options = options.replace("network", "block").split()
    done(*TRAIN, *options, "--prompts", "prompts.txt", "--steps", "2", "--set", "compose=1", "-o", "gates")
    trained = TrainedGates.load("gates.safetensors")
    chosen = trained.gates.settings
    assert (chosen.granularity, chosen.activation, chosen.reads) == ("block", "softmax-null", "hidden")
    settings = trained.training["settings"]
    assert {k: settings[k] for k in ("balance", "seed", "batch", "learning_rate", "compose", "samples")} == {
        "balance": 0.5, "seed": 3, "batch": 8, "learning_rate": 0.1, "compose": 1.0, "samples": 12,
    }  # fmt: skip
    assert trained.training["prompts"][:3] == ["a heart on fire, burning", "heart", "ember style"]
    assert trained.training["strengths"] == [0.8, 1.0]


def test_the_router_needs_no_steps() -> None:
    """The gates are the router's, with a detector fitted on the pipeline's own encodings."""
    text = done(*TRAIN, "--objective", "router", "-o", "gates")
    assert "router on UNet2DConditionModel: 8 gates, 35 prompts\n" in text
    trained = TrainedGates.load("gates.safetensors")
    concepts = [["ember style", "burning"], ["heart"]]
    prompts = trained.training["prompts"]
    detector, notes = fit_detector(concepts, PipelinePromptEncoder(tiny.build("SD 1.5")), prompts)
    expected = route_gates(detector, trained.gates.settings, trained.gates.names)
    torch.testing.assert_close(trained.gates.state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-3)
    assert trained.gates.detector is not None
    assert trained.gates.detector.words == (("ember style", "burning"), ("heart",))
    assert notes  # of random encoders
    for note in notes:
        assert f"note: {note}" in " ".join(text.split())


def test_notes_are_in_the_facts_too() -> None:
    data = json.loads(done(*TRAIN, "--objective", "router", "--json", "-o", "gates"))
    assert any("hardly tell 'heart' from other words" in note for note in data["notes"])


def test_gates_that_read_the_mean_of_the_text_as_earlier_versions_did() -> None:
    text = done(*TRAIN, "--objective", "router", "--reads", "text-mean", "-o", "gates")
    note = "read the mean of the text over all tokens and close when a prompt gets longer"
    assert squeezed(text).count(note) == 1
    trained = TrainedGates.load("gates.safetensors")
    pipe = tiny.build("SD 1.5")
    prompts = trained.training["prompts"]
    encoded = torch.cat([pipe.encode_prompt(prompt, "cpu", 1, False)[0].mean(1) for prompt in prompts])
    asked = concepts_in(prompts, [["ember style", "burning"], ["heart"]])
    expected = route_mean_gates(encoded.detach(), asked, trained.gates.settings, ["x"])["x"]
    for scope in trained.gates.names:
        torch.testing.assert_close(trained.gates[scope].state_dict(), expected.state_dict(), rtol=1e-3, atol=1e-3)
    assert note in squeezed(done("inspect", "gates.safetensors"))
    (fact,) = json.loads(done("inspect", "--json", "gates.safetensors"))["files"]
    assert len(fact["notes"]) == 1
    assert note in fact["notes"][0]


def test_inspect_tells_about_gates_of_the_first_version() -> None:
    done(*TRAIN, "--objective", "router", "--reads", "text-mean", "-o", "gates")
    tensors, header = read_tensors(Path("gates.safetensors"))
    header = {key: value for key, value in header.items() if key != "words"}
    header |= {"kind": "legomole.gates.1", "settings": header["settings"].replace("text-mean", "text")}
    write_tensors(Path("old.safetensors"), {name: tensor.clone() for name, tensor in tensors.items()}, header)
    text = squeezed(done("inspect", "old.safetensors"))
    assert "gates per layer, sigmoid, read text-mean" in text
    assert "close when a prompt gets longer" in text
    pipe = tiny.build("SD 1.5")
    loras = legomole.experts(pipe, [legomole.load(path) for path in ("style.safetensors", "heart.safetensors")])
    with pytest.warns(UserWarning, match=r"old\.safetensors: these gates read the mean"):
        assert legomole.load_gates(pipe, "old.safetensors", loras).settings.reads == "text-mean"


def test_pictures_come_from_folders() -> None:
    for name, color in (("fire", "red"), ("love", "pink")):
        Path(name).mkdir()
        Image.new("RGB", (20, 24), color).save(f"{name}/one.png")
    Path("fire/one.txt").write_text("a dog in\nember style\n", encoding="utf-8")
    options = ("--objective", "denoise", "--images", "1:fire", "--images", "2:love", "--steps", "2")
    done(*TRAIN, *options, "-o", "gates")
    prompts = TrainedGates.load("gates.safetensors").training["prompts"]
    assert prompts[-1] == "a dog in ember style"
    assert prompts.count("heart") == 1


@pytest.mark.parametrize("kind", ["cut off", "enormous", "no picture"])
def test_pictures_that_are_broken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("x").mkdir()
    Image.new("RGB", (20, 24)).save("x/one.png")
    if kind == "enormous":
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 20)
    else:
        raw = Path("x/one.png").read_bytes()
        Path("x/one.png").write_bytes(raw[:45] if kind == "cut off" else b"GIF")
    with pytest.raises(FormatError, match=r"The picture cannot be read[\s\S]*one\.png"):
        read_pictures(["1:x"], [["fire"]])


# ---- interruptions


def test_an_interrupted_training_goes_on_to_the_same_file(interrupt: Any) -> None:
    options = ("--steps", "8", "--state", "state", "-o", "gates")
    interrupt(5)
    result = run(*TRAIN, *options)
    assert result.exit_code == 130
    assert "A checkpoint is kept in state: the same command resumes" in squeezed(result.output)
    assert not Path("gates.safetensors").exists()
    other = run(*TRAIN, *options, "--seed", "1")
    assert other.exit_code == 3
    assert "state of another training" in squeezed(other.output)
    interrupt(-1)
    done(*TRAIN, *options)
    assert list(Path("state").iterdir()) == []
    done(*TRAIN, "--steps", "8", "-o", "whole")
    assert Path("gates.safetensors").read_bytes() == Path("whole.safetensors").read_bytes()


def test_a_cancel_says_what_is_left(interrupt: Any) -> None:
    interrupt(0)
    result = run(*TRAIN, "--state", "state", "-o", "gates")
    assert result.exit_code == 130
    assert "before the first checkpoint" in squeezed(result.output)
    result = run(*TRAIN, "-o", "gates")
    assert "With --state FOLDER the training could be resumed" in squeezed(result.output)


def test_too_little_memory_says_what_to_try(interrupt: Any) -> None:
    interrupt(1, torch.cuda.OutOfMemoryError)
    result = run(*TRAIN, "-o", "gates")
    assert result.exit_code == 3
    assert "try --checkpointing, a smaller --batch" in squeezed(result.output)


# ---- bad input


USAGE = {
    "words missing": (("pipe", *LORAS, "--words", "ember"), "2 LoRAs and 1 times --words"),
    "a second strength": (("pipe", "style.safetensors:1:0.5", "--words", "x"), "a LoRA has one strength here"),
    "no words": (("pipe", *LORAS), "give --words once for every LoRA"),
    "texts": (("pipe", *LORAS, *WORDS, "--texts", "a.jsonl"), "is a diffusers pipeline, for which there is no --texts"),
    "a setting with an option": (("pipe", *LORAS, *WORDS, "--set", "steps=3"), "use the option --steps 3"),
    "a wrong size": (("pipe", *LORAS, *WORDS, "--size", "big"), "'big' is not a size"),
    "a wrong setting": (("pipe", *LORAS, *WORDS, "--set", "examples=none"), "examples = none"),
    "an unknown setting": (("pipe", *LORAS, *WORDS, "--set", "exampels=5"), "exampels"),
    "pictures of nobody": (("pipe", *LORAS, *WORDS, "--images", "3:x"), "from 1 to 2"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage(case: str) -> None:
    arguments, words = USAGE[case]
    result = run("train-gates", *arguments, "-o", "gates")
    assert result.exit_code == 2
    assert words in squeezed(result.output)


BAD = {
    "no pipeline": (("nothing", *LORAS, *WORDS), "no model of this name"),
    "no LoRA": (("pipe", "gone.safetensors", "--words", "x"), "There is no such file"),
    "another architecture": (("pipe", "flux.safetensors", "--words", "x"), "made for another base model"),
    "the same word twice": (("pipe", *LORAS, "--words", "x", "--words", "X"), "named by the same word"),
    "no words": (("pipe", *LORAS, "--words", "x", "--words", ","), "has no words"),
    "zero strength": (("pipe", "style.safetensors:0", "--words", "x"), "strength 0"),
    "no pictures": (("pipe", *LORAS, *WORDS, "--objective", "denoise"), "needs images"),
    "an empty folder": (("pipe", *LORAS, *WORDS, "--images", "1:pipe"), "There are no pictures"),
    "no prompts": (("pipe", *LORAS, *WORDS, "--prompts", "gone.txt"), "The text cannot be read"),
    "a prompt for one only": (("pipe", *LORAS, *WORDS, "--prompts", "prompts.txt"), "None of the prompts names LoRA"),
    "no such device": (("pipe", *LORAS, *WORDS, "--device", "warp"), "This device cannot be used"),
    "half a pipeline": (("half", *LORAS, *WORDS), "The pipeline cannot be loaded"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_own_words(case: str) -> None:
    Path("prompts.txt").write_text("heart\n", encoding="utf-8")
    Path("half").mkdir()
    Path("half/model_index.json").write_text("{}", encoding="utf-8")
    arguments, words = BAD[case]
    result = run("train-gates", *arguments, *SMALL, "-o", "gates")
    assert result.exit_code == 3
    assert words in squeezed(result.output)
    assert not Path("gates.safetensors").exists()


def test_outputs_are_not_replaced_by_accident() -> None:
    Path("gates.safetensors").write_bytes(b"precious")
    assert run(*TRAIN, "-o", "gates").exit_code == 4
    assert run(*TRAIN, "-o", "style.safetensors", "--overwrite").exit_code == 4
    Path("plot.png").write_bytes(b"precious")
    assert run(*TRAIN, "-o", "other", "--plot", "plot").exit_code == 4
    assert run(*TRAIN, "-o", "other", "--plot", "gone/plot").exit_code == 4
    assert not Path("other.safetensors").exists()
    assert Path("gates.safetensors").read_bytes() == b"precious"
    done(*TRAIN, "--steps", "1", "-o", "gates", "--overwrite")
    assert torch.isfinite(TrainedGates.load("gates.safetensors").gates.values(torch.zeros(1, 2))[0]).all()
