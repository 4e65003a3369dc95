"""The examples in docs/, carried out."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import legomole
import pytest
import torch
from legomole.cli import app
from legomole.core.recipes.read import read_recipe
from typer.testing import CliRunner

DOCS = Path(legomole.__file__).parent / "docs"


def blocks(document: str, language: str) -> list[str]:
    text = (DOCS / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


def merge(command: str) -> None:
    result = CliRunner().invoke(app, shlex.split(command)[1:])
    assert result.exit_code == 0, result.output


@pytest.fixture
def language_model(tmp_path, monkeypatch) -> dict[str, list[torch.Tensor]]:
    """A tiny Llama and two LoRAs of its first projections on disk; returns prompts, of other words for each kind."""
    peft, transformers = pytest.importorskip("peft"), pytest.importorskip("transformers")
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=64, **shape)).save_pretrained("base")
    for name in ("style", "subject"):
        model = transformers.AutoModelForCausalLM.from_pretrained("base")
        config = peft.LoraConfig(r=8, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
        peft.get_peft_model(model, config).save_pretrained(name)
    words = {"style_prompts": (0, 12), "subject_prompts": (12, 24), "prompts_with_both": (0, 24)}
    return {kind: [torch.randint(*range_, (4, 8))] for kind, range_ in {**words, "other_prompts": (24, 64)}.items()}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
def test_calibrating_on_a_pipeline_goes_as_the_page_says(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from .hosts.diffusers import tiny_pipelines as tiny

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    pipe = tiny.build("SD 1.5")
    pipe.save_pretrained("sd15")
    for seed, name in ((1, "style"), (2, "heart")):
        legomole.save(tiny.lora(pipe, seed), name, format="diffusers")
    measure, again, _ = blocks("calibrated.md", "sh")
    for command in (*measure.splitlines(), *again.splitlines()):
        merge(command)
    deltas = [
        torch.cat([part.delta().flatten() for part in legomole.load(f"{name}.safetensors").modules.values()])
        for name in ("both", "calm")
    ]
    assert deltas[1].norm() < deltas[0].norm()  # more weight on leaving the model alone


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the libraries' own
def test_the_calibrated_merge_is_nearer_to_each_lora_on_its_own_inputs(language_model):
    """By the measured moments: ``|W - delta_i|_C_i`` summed over both LoRAs and all layers is below the plain SVD's."""
    (code,), (*_, command) = blocks("calibrated.md", "python"), blocks("calibrated.md", "sh")
    found = dict(language_model)
    exec(code, found)
    merge(command)
    merge("legomole merge style subject --method svd --rank 8 -o svd")
    merge("legomole merge --config both -o again")
    assert Path("both/adapter_model.safetensors").read_bytes() == Path("again/adapter_model.safetensors").read_bytes()
    merge("legomole merge --config both --method svd --rank 8 -o changed")
    assert "statistics_sha256" in read_recipe(Path("both")).to_dict()
    assert "statistics_sha256" not in read_recipe(Path("changed")).to_dict()
    away = {}
    for name in ("both", "svd"):
        merged = legomole.load(name)
        assert {part.rank for part in merged.modules.values()} == {8}
        errors = [
            ((E := part.delta() - lora.modules[layer].delta()) @ moments[layer] * E).sum()
            for lora, moments in zip(found["loras"], (found["style"], found["subject"]), strict=True)
            for layer, part in merged.modules.items()
        ]
        away[name] = float(torch.stack(errors).sum())
    assert away["both"] < 0.9 * away["svd"]
