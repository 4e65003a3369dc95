"""`legomole merge --base`: measured statistics, their cache, and merges without words."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from legomole.core.formats import load, save
from legomole.core.merge import statistics_cache
from legomole.core.merge.statistics import Statistics
from legomole.core.recipes.read import read_recipe as recipe_of
from legomole.hosts import calibration

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from ..hosts.diffusers import tiny_pipelines as tiny
from ..hosts.transformers import tiny_language
from .command import done, enter_copy, run, squeezed

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")

LORAS = ("merge", "style.safetensors:0.8", "heart.safetensors")
BASE = ("--base", "pipe", "--size", "16")
WORDS = ("--words", "1:ember style, burning", "--words", "2:heart")
MERGE = (*LORAS, *BASE, *WORDS)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    pipe = tiny.build("SD 1.5")
    pipe.save_pretrained(folder / "pipe")
    for seed, name in ((1, "style"), (2, "heart"), (3, "other")):
        save(tiny.lora(pipe, seed), folder / name, format="diffusers")
    model = tiny_language.llama()
    model.save_pretrained(folder / "llama")
    tiny_language.tokenizer().save_pretrained(folder / "llama")
    for seed, name in ((1, "sums"), (2, "poems")):
        save(tiny_language.lora(model, seed), folder / name, format="peft")
    return folder


@pytest.fixture(autouse=True)
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    enter_copy(made, tmp_path, monkeypatch)
    (tmp_path / "llama").symlink_to(made / "llama")
    for name in ("sums", "poems"):
        shutil.copytree(made / name, tmp_path / name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def cached() -> list[Path]:
    return sorted(statistics_cache.cache_folder().glob("*"))


def test_one_command_measures_and_merges_and_can_be_repeated():
    text = squeezed(done(*MERGE, "--rank", "2", "-o", "both.safetensors"))
    assert "lego: 2 LoRAs" in text
    assert "no statistics" not in text
    assert "measured" in text
    (path,) = cached()
    statistics = Statistics.load(path)
    assert statistics.adapters == tuple(load(f"{name}.safetensors").source.sha256 for name in ("style", "heart"))
    assert {part.rank for part in load("both.safetensors").modules.values()} == {2}
    done("merge", "--config", "both.safetensors", "-o", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("both.safetensors").read_bytes()
    done(*LORAS, "--rank", "2", "-o", "plain.safetensors")
    plain, both = load("plain.safetensors"), load("both.safetensors")
    assert any(not torch.equal(plain.modules[name].delta(), part.delta()) for name, part in both.modules.items())


def test_another_rank_strength_or_method_measures_nothing():
    done(*MERGE, "-o", "first.safetensors")
    before = cached()
    for i, more in enumerate((["--rank", "2"], ["--method", "calibrated"], ["--method", "svd"])):
        assert "found the statistics" in squeezed(done(*MERGE, *more, "-o", f"next-{i}"))
    text = done("merge", "style.safetensors:0.5", "heart.safetensors:-1", *BASE, *WORDS, "-o", "louder")
    assert "found the statistics" in squeezed(text)
    assert cached() == before
    text = squeezed(done(*LORAS, *BASE, "--words", "fire", "--words", "heart", "-o", "words"))
    assert "measured" in text
    assert len(cached()) == 2


def test_statistics_can_be_kept_in_a_file():
    done(*MERGE, "--statistics", "s.safetensors", "-o", "l.safetensors")
    assert "statistics: s.safetensors" in squeezed(done("inspect", "l.safetensors", "--recipe"))
    shutil.rmtree("cache")
    done("merge", "--config", "l.safetensors", "-o", "again.safetensors")
    assert Path("again.safetensors").read_bytes() == Path("l.safetensors").read_bytes()
    done(*LORAS, "--method", "calibrated", "--set", "lam=3", "--statistics", "s.safetensors", "-o", "calm")
    Path("s.safetensors").write_bytes(b"precious")
    assert "exists already" in squeezed(run(*MERGE, "--statistics", "s.safetensors", "-o", "new").stderr)
    assert Path("s.safetensors").read_bytes() == b"precious"


def test_thorough_measures_full_matrices():
    done(*MERGE, "--keep-base", "thorough", "--statistics", "s.safetensors", "-o", "o")
    assert not any(moments.light for moments in Statistics.load("s.safetensors").modules.values())


def test_off_measures_nothing():
    done(*LORAS, "--base", "pipe", "--keep-base", "off", "-o", "off.safetensors")
    done(*LORAS, "-o", "plain.safetensors")
    assert not cached()
    assert Path("off.safetensors").read_bytes() == Path("plain.safetensors").read_bytes()


def test_words_come_from_the_files():
    style = load("style.safetensors")
    for name, trigger in (("a", "ember, shared"), ("b", "heart, shared")):
        save(tiny.lora(tiny.build("SD 1.5"), 1 if name == "a" else 2), name, format="diffusers")
        shutil.move(f"{name}.safetensors", f"{name}-raw.safetensors")
        adapter = load(f"{name}-raw.safetensors")
        assert set(adapter.modules) == set(style.modules)
        save(
            type(adapter)(adapter.modules, metadata={"modelspec.trigger_phrase": trigger}),
            f"{name}.safetensors",
            format="diffusers",
        )
    done("merge", "a.safetensors", "b.safetensors", *BASE, "-o", "ab.safetensors")
    prompts = json.loads(Statistics.load(cached()[0]).metadata["prompts"])
    assert any("ember" in prompt and "heart" in prompt for prompt in prompts)
    assert not any("shared" in prompt for prompt in prompts)


def test_without_words_it_says_so_and_merges_without():
    text = squeezed(done(*LORAS, *BASE, "-o", "both.safetensors"))
    assert "not calibrated on the base model: no words for style, heart" in text
    done(*LORAS, "-o", "plain.safetensors")
    plain, both = load("plain.safetensors"), load("both.safetensors")
    assert all(torch.equal(plain.modules[name].A, part.A) for name, part in both.modules.items())
    assert "no words for heart" in squeezed(done(*LORAS, *BASE, "--words", "1:ember", "-o", "one.safetensors"))
    assert not cached()


def test_nothing_is_measured_for_an_output_that_may_not_be_written():
    Path("both.safetensors").write_bytes(b"precious")
    assert "exists already" in squeezed(run(*MERGE, "-o", "both.safetensors").stderr)
    assert not cached()
    assert Path("both.safetensors").read_bytes() == b"precious"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*LORAS, "--words", "x", "-o", "o"), "belong to --base"),
        ((*LORAS, "--keep-base", "light", "-o", "o"), "belong to --base"),
        ((*LORAS, *BASE, "--words", "x", "-o", "o"), "2 LoRAs and 1 times --words"),
        ((*LORAS, *BASE, "--words", "3:x", "-o", "o"), "N from 1 to 2"),
        ((*LORAS, *BASE, "--words", "1:x", "--words", "1:y", "-o", "o"), "once for each"),
        ((*LORAS, *BASE, "--instruction", "1:x", "--instruction", "2:y", "-o", "o"), "not for a diffusers pipeline"),
        (("merge", "sums", "poems", "--base", "llama", "--words", "1:x", "--words", "2:y", "-o", "o"),
         "not for a language model"),
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
        (("--rank", "many"), "not a rank"),
        (("--method", "calibrated", "--set", "lam=-1"), "is negative"),
        (("--density", "0.5"), "has no such setting"),
        (("--device", "warp"), "cannot be used"),
    ],
)
def test_what_the_merge_would_refuse_is_refused_before_measuring(arguments, words):
    result = run(*MERGE, *arguments, "-o", "o")
    assert result.exit_code == 3
    assert words in squeezed(result.stderr)
    assert not cached()


def test_a_sweep_merges_with_the_best_and_writes_the_ranking():
    text = squeezed(done(*MERGE, "--sweep", "sweep.html", "-o", "best.safetensors"))
    assert "sweep: 14 merges by predicted loss" in text
    assert "wrote sweep.html" in text
    assert "<td class=name>calibrated 2x</td>" in Path("sweep.html").read_text()
    data = json.loads(done(*MERGE, "--rank", "2", "--sweep", "s.csv", "--json", "-o", "again.safetensors"))
    best = data["sweep"]["candidates"][0]
    rows = Path("s.csv").read_text().splitlines()
    assert len(rows) == 15
    made = recipe_of(Path("again.safetensors"))
    assert made.method == best["method"]
    assert made.settings.get("rank", "") == (int(best["rank"]) if best["rank"] else "")
    weights = [entry.weight for entry in made.inputs]
    assert weights == pytest.approx([0.8 * best["strength"], best["strength"]])
    by_hand = ["--method", best["method"], *(["--rank", best["rank"]] if best["rank"] else [])]
    loras = [f"{name}.safetensors:{weight!r}" for name, weight in zip(("style", "heart"), weights, strict=True)]
    done("merge", *loras, *BASE, *WORDS, *by_hand, "-o", "hand.safetensors")
    assert_equal_layers("again.safetensors", "hand.safetensors")
    done("merge", "--config", "again.safetensors", "-o", "repeated.safetensors")
    assert_equal_layers("again.safetensors", "repeated.safetensors")


def assert_equal_layers(first: str, second: str) -> None:
    layers = load(second).modules
    assert all(torch.equal(part.A, layers[name].A) for name, part in load(first).modules.items())


def test_a_sweep_from_a_file_of_statistics_and_suggested_strengths():
    done(*MERGE, "--statistics", "s.safetensors", "-o", "l.safetensors")
    shutil.rmtree("cache")
    plain = json.loads(done(*LORAS, "--statistics", "s.safetensors", "--sweep", "a.png", "--json", "-o", "a"))
    command = (*LORAS, "--statistics", "s.safetensors", "--suggest", "--sweep", "b.png", "--json", "-o", "b")
    both = json.loads(done(*command))
    assert both["sweep"]["weights"] == pytest.approx(both["suggestion"]["weights"])
    assert plain["sweep"]["weights"] == [0.8, 1]


def test_suggested_strengths_of_a_sum_are_those_of_joint_prompts():
    data = json.loads(done(*MERGE, "--method", "concat", "--suggest", "--json", "-o", "sum"))
    assert data["suggestion"]["weights"] == pytest.approx([0.96, 1.2], rel=0.05)
    assert "on prompts for several LoRAs" in data["suggestion"]["reasons"][-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*LORAS, "--sweep", "s.html"), "--sweep predicts on the base model"),
        ((*MERGE, "--sweep", "s.txt"), "--sweep writes .html, .png or .csv"),
        ((*MERGE, "--sweep", "s.html", "--method", "svd"), "--sweep chooses the method"),
        ((*MERGE, "--sweep", "pipe"), "--sweep writes"),
        ((*MERGE, "--sweep", "nowhere/s.html"), "folder does not exist"),
        ((*LORAS, *BASE, "--sweep", "s.html"), "no words for style, heart"),
        ((*MERGE, "--keep-base", "off", "--sweep", "s.html"), "needs statistics"),
    ],
)
def test_a_sweep_that_cannot_be_made(arguments, words):
    result = run(*arguments, "-o", "o")
    assert result.exit_code in (2, 3, 4)
    assert words in squeezed(result.stderr)
    assert not Path("o.safetensors").exists()
    assert not Path("s.html").exists()


def test_cancelling_leaves_nothing_behind(monkeypatch):
    def cancel(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("legomole.core.train.measure._PassRunner.__call__", cancel)
    assert run(*MERGE, "--statistics", "s.safetensors", "-o", "o").exit_code == 130
    assert not cached()
    assert not Path("s.safetensors").exists()
    assert not Path("o.safetensors").exists()


def test_a_full_device_is_reported(monkeypatch):
    def full(*_, **__):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nDetails")

    monkeypatch.setattr(calibration, "calibrate", full)
    text = squeezed(run(*MERGE, "-o", "o").stderr)
    assert "not enough memory" in text
    assert "a smaller --size" in text


def test_language_models_are_measured_on_texts_and_instructions():
    Path("sums.txt").write_text("w1 w2 w3\nw4 w5\n\nw1 w5 w6\n")
    Path("sums.jsonl").write_text('{"prompt": "w1 w2", "completion": " w3"}\n')
    adapters = ("merge", "sums", "poems", "--base", "llama")
    text = squeezed(done(*adapters, "--texts", "1:sums.txt", "--instruction", "2:w7 w8", "-o", "both"))
    assert "lego: 2 LoRAs" in text
    statistics = Statistics.load(cached()[0])
    assert json.loads(statistics.metadata["texts"]) == [3, 8]
    assert set(load("both").modules) == set(statistics.modules)
    done(*adapters, "--texts", "1:sums.jsonl", "--texts", "2:sums.txt", "-o", "other")
    assert "no texts for poems" in squeezed(done(*adapters, "--texts", "1:sums.txt", "-o", "plain"))


def test_a_checkpoint_gives_weights_but_cannot_be_measured() -> None:
    """One option for the base model: DoRA needs its weights, and a file of weights cannot be run."""
    from safetensors.torch import save_file

    save_file({"a.weight": torch.zeros(2, 2)}, "weights.safetensors")
    result = run(*LORAS, "--base", "weights.safetensors", "--words", "a", "--words", "b", "-o", "o")
    assert result.exit_code == 2
    assert "cannot be run" in squeezed(result.stderr)
    text = squeezed(done(*LORAS, "--base", "weights.safetensors", "-o", "o"))
    assert "not calibrated on the base model" in text
    assert "base:" not in done("inspect", "o.safetensors", "--recipe")  # no LoRA needed its weights


def test_dora_is_merged_and_measured_with_the_same_base() -> None:
    import peft

    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], use_dora=True, init_lora_weights=False)
    peft.get_peft_model(tiny_language.llama(), config).save_pretrained("dora")
    Path("sums.txt").write_text("w1 w2\nw3 w4\n")
    words = ("--texts", "1:sums.txt", "--instruction", "2:w7 w8", "--convert-rank", "4")
    text = squeezed(done("merge", "dora", "poems", "--base", "llama", *words, "-o", "both"))
    assert "predicted errors" in text
    done("merge", "--config", "both", "-o", "again")
    assert load("again").modules.keys() == load("both").modules.keys()
    assert all(torch.equal(part.B, load("again").modules[name].B) for name, part in load("both").modules.items())
