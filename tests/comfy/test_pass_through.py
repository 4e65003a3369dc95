"""Graphs without a LoRA that is switched on: they give the image of the model alone, and say so."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch

from .conftest import picture_of
from .graph import Graph, Link
from .server import Server

pytestmark = pytest.mark.comfy


def all_rows_off(graph: Graph, files: dict[str, str]) -> Link:
    rows = [{"name": files[name], "on": False, "strength": 1.0} for name in ("flux_kohya", "flux_split")]
    return graph.add("LegoMoLE_LoRAList", loras=json.dumps(rows))


@pytest.mark.parametrize("case", ["all rows off", "nothing connected", "all switched off"])
def test_mix_of_no_loras_passes_the_model_through(
    comfy: Server, files: dict[str, str], sample: Callable, case: str
) -> None:
    """Also with the nodes that follow a mix: Gate Map, and Freeze to LoRA with Apply LoRA and Save LoRA."""
    plain, graph = Graph(), Graph()
    expected = sample(plain, plain.picture())
    if case == "all switched off":
        mix = graph.mix(graph.load(files["flux_kohya"]), switched_off="flux_kohya", clip=graph.clip)
    else:
        mix = graph.mix(*([all_rows_off(graph, files)] if case == "all rows off" else []), clip=graph.clip)
    node = graph.picture(mix, [mix[0], 1])
    chart = graph.add("LegoMoLE_GateMap", model=mix, after=["KSampler0", 0])
    positive = graph.add("CLIPTextEncode", text="heart", clip=graph.clip)
    settings = {"positive": positive, "latent_image": graph.empty(), "method": "concat", "steps": 2, "seed": 1}
    frozen = graph.add("LegoMoLE_FreezeToLoRA", model=mix, **settings)
    graph.save(frozen, "none/frozen")
    applied, _ = graph.apply(frozen)
    graph.add("PreviewAny", source=[applied[0], 2])
    graph.add("PreviewAny", source=[chart[0], 1])
    run = comfy.run(graph.nodes)
    assert torch.equal(picture_of(comfy, run, node)[1], expected[1])
    reason = "every LoRA is switched off" if case == "all switched off" else "no LoRA is connected or switched on"
    assert run.outputs[mix[0]]["text"] == [f"{reason}: model and CLIP are passed on unchanged"]
    assert run.outputs[mix[0]]["experts"] == (["flux_kohya"] if case == "all switched off" else [])
    assert run.outputs["PreviewAny0"]["text"] == [
        "no LoRA is connected or switched on: model and CLIP are passed on unchanged"
    ]
    assert run.outputs["PreviewAny1"]["text"] == ["every LoRA of the mix is switched off: there are no gates"]
    assert run.outputs["LegoMoLE_GateMap0"]["images"]
    assert not (comfy.loras / "none").exists()


@pytest.mark.parametrize("method", ["lego", "concat"])
def test_merge_of_no_loras_changes_nothing(comfy: Server, files: dict[str, str], sample: Callable, method: str) -> None:
    plain, graph = Graph(), Graph()
    expected = sample(plain, plain.picture())
    rows = all_rows_off(graph, files)
    merged = graph.lego(rows) if method == "lego" else graph.merge(method, rows)
    graph.save(merged, "none/merged")
    again = graph.merge("concat", merged)  # a merge of no LoRAs is no LoRA of the next merge
    node = graph.picture(*graph.apply(again))
    run = comfy.run(graph.nodes)
    assert torch.equal(picture_of(comfy, run, node)[1], expected[1])
    assert run.outputs[merged[0]]["text"][0].startswith("no LoRA is connected or switched on")
    assert run.outputs["LegoMoLE_SaveLoRA0"]["text"] == ["no LoRA is connected or switched on: no file is written"]
    assert not (comfy.loras / "none").exists()


def test_training_still_needs_loras(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    graph.picture(graph.mix(graph.load(files["flux_kohya"]), gates=graph.train(all_rows_off(graph, files))))
    assert "No LoRA is connected." in comfy.fail(graph.nodes)
