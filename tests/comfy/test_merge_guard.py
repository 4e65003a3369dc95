"""ComfyUI's nodes that save and merge models, after MoLE Mix: they would lose the gates, so they are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from safetensors.torch import load_file

from .graph import Graph, Link
from .server import Server

pytestmark = pytest.mark.comfy


def save_model(graph: Graph, mix: Link) -> None:
    graph.add("ModelSave", model=mix, filename_prefix="guard/model")


def extract_lora(graph: Graph, mix: Link) -> None:
    difference = graph.add("ModelMergeSubtract", model1=mix, model2=graph.model, multiplier=1.0)
    graph.add(
        "LoraSave", model_diff=difference, filename_prefix="guard/lora", rank=4, lora_type="standard", bias_diff=False
    )


def merge_into(graph: Graph, mix: Link) -> None:
    graph.picture(graph.add("ModelMergeSimple", model1=graph.model, model2=mix, ratio=0.5))


def scale(graph: Graph, mix: Link) -> None:
    clone = graph.add("ModelSamplingFlux", model=mix, max_shift=1.15, base_shift=0.5, width=64, height=64)
    graph.picture(graph.add("ModelMergeSimple", model1=clone, model2=graph.model, ratio=0.5))


@pytest.mark.parametrize("use", [save_model, extract_lora, merge_into, scale])
def test_saving_and_merging_a_mix_is_refused(comfy: Server, files: dict[str, str], use: Callable) -> None:
    graph = Graph()
    use(graph, graph.mix(graph.load(files["flux_kohya"])))
    message = comfy.fail(graph.nodes)
    assert "a model with a mix: the gates depend on the prompt and are not weights." in message
    assert "Freeze to LoRA" in message
    assert not list((comfy.base / "output").glob("guard/*"))


def test_a_model_that_is_only_added_keeps_the_mix(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    """At ratio 1 ModelMergeSimple keeps model1 as it is."""
    mixed, merged = Graph(), Graph()
    mix = mixed.mix(mixed.load(files["flux_kohya"]))
    kept = merged.mix(merged.load(files["flux_kohya"]))
    sum_of_both = merged.add("ModelMergeSimple", model1=kept, model2=merged.model, ratio=1.0)
    a, b = sample(mixed, mixed.picture(mix)), sample(merged, merged.picture(sum_of_both))
    assert torch.equal(a[1], b[1])


def test_the_frozen_mix_can_be_saved(comfy: Server, files: dict[str, str]) -> None:
    """What the error advises: the saved model differs from the base model by the LoRA."""
    graph = Graph()
    graph.add("ModelSave", model=graph.model, filename_prefix="frozen_model/base")
    positive = graph.add("CLIPTextEncode", text="heart", clip=graph.clip)
    settings = {"positive": positive, "latent_image": graph.empty(), "method": "concat", "steps": 1, "seed": 1}
    frozen = graph.add("LegoMoLE_FreezeToLoRA", model=graph.mix(graph.load(files["flux_kohya"])), **settings)
    graph.add("ModelSave", model=graph.apply(frozen)[0], filename_prefix="frozen_model/frozen")
    comfy.run(graph.nodes)
    folder = comfy.base / "output" / "frozen_model"
    base, saved = (load_file(folder / f"{name}_00001_.safetensors") for name in ("base", "frozen"))
    changed = {name for name in base if not torch.equal(base[name], saved[name])}
    assert {name.removeprefix("model.diffusion_model.").removeprefix("diffusion_model.") for name in changed} == {
        "double_blocks.0.img_attn.qkv.weight",
        "double_blocks.0.img_mlp.0.weight",
        "single_blocks.0.linear1.weight",
        "single_blocks.0.linear2.weight",
        "final_layer.adaLN_modulation.1.weight",
    }
