"""The page on mixing, carried out from top to bottom on a tiny pipeline."""

from __future__ import annotations

import functools
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

import diffusers
import legomole
from legomole.core.lowrank import LowRank
from legomole.core.mole.trained import TrainedGates
from legomole.hosts.diffusers.layer_names import to_kohya
from legomole.hosts.diffusers.mixing import _PromptRouter

from .cli.test_train_pipeline import SMALL
from .hosts.diffusers import tiny_pipelines as tiny
from .test_docs import blocks, merge

TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
FEW = "TrainSettings(steps=8, batch=8, examples=16, samples=12, warmup=1, learning_rate=0.1)"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A pipeline and two LoRAs under the page's names, the first with a layer of the text encoder; quick pictures."""
    monkeypatch.chdir(tmp_path)
    pipe = tiny.build("SD 1.5")
    pipe.save_pretrained("sd15")
    style = tiny.lora(pipe, 1)
    text = {TEXT: LowRank(torch.arange(8.0)[None], torch.arange(8.0)[:, None])}
    legomole.save(to_kohya(legomole.Adapter({**style.modules, **text})), "style", format="kohya")
    legomole.save(tiny.lora(pipe, 2), "heart", format="diffusers")
    whole = diffusers.StableDiffusionPipeline.__call__

    @functools.wraps(whole)
    def quick(self: Any, prompt: str) -> Any:
        return whole(self, prompt, num_inference_steps=1, generator=torch.Generator().manual_seed(0))

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "__call__", quick)
    return tmp_path


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore:style. 1 layers belong to text encoders")
def test_the_page_works_from_top_to_bottom(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, routed, training, using, masks, freezing, text = blocks("mole.md", "python")
    (commands,) = blocks("mole.md", "sh")
    train, inspect = (line for line in commands.splitlines() if line)
    names: dict[str, Any] = {}

    exec(plain, names)
    pixels = torch.tensor(list(names["image"].tobytes()))
    base = torch.tensor(list(names["pipe"]("a heart, ember style").images[0].tobytes()))
    assert not torch.equal(pixels, base)

    seen: list[list[list[float]]] = []
    values = _PromptRouter.gates_for
    monkeypatch.setattr(_PromptRouter, "gates_for", lambda self, t: seen.append((v := values(self, t)).tolist()) or v)
    exec(routed, names)
    assert seen[0] == [[0.0, 0.0], [0.0, 1.0]]  # "this picture is painted by the second LoRA alone"

    assert "TrainSettings(steps=200)" in training
    exec(training.replace("TrainSettings(steps=200)", FEW), names)
    assert len(TrainedGates.load("gates.safetensors").training["losses"]) == 8
    merge(shlex.join([*shlex.split(train), *SMALL, "--steps", "2", "--overwrite"]))
    merge(inspect)
    exec(using, names)
    assert names["mixture"].gates.trained

    exec(masks, names)
    assert (names["style_off"].labels, names["only_style"].labels) == (("heart",), ("style",))
    assert (names["quiet"].strengths, names["quiet"].scale) == ((0.3, 1.0), 0.9)

    exec(freezing, names)
    frozen, record = legomole.load("frozen.safetensors"), names["record"]
    assert {scope: value.shape for scope, value in record.mean().items()} == dict.fromkeys(record.scopes, (2,))
    module, scope = next((m, s) for s in record.scopes for m in frozen.modules if m.startswith(f"unet.{s}."))
    expected = sum(
        float(record.mean()[scope][i]) * (0.8, 1.0)[i] * expert.modules[module].delta()
        for i, expert in enumerate(names["mixture"].experts)
    )
    torch.testing.assert_close(frozen.modules[module].delta(), expected, rtol=1e-4, atol=1e-4)

    before = names["pipe"].text_encoder(torch.tensor([[0, 5, 1]]))[0]
    exec(text, names)
    after = names["pipe"].text_encoder(torch.tensor([[0, 5, 1]]))[0]
    assert legomole.load("text.safetensors").modules.keys() == {TEXT}
    assert float((after - before).detach().abs().max()) > 1e-3
