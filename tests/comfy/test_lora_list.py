"""LoRA List, and what the page asks the server for."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from .graph import Graph
from .server import Server

pytestmark = pytest.mark.comfy

PICTURE = "data:image/png;base64,iVBORw0KGgo="


def rows(*entries: dict[str, Any]) -> str:
    return json.dumps(entries)


def row(name: str, strength: float = 1.0, on: bool = True) -> dict[str, Any]:
    return {"name": name, "on": on, "strength": strength}


def test_list_is_what_its_loaders_are(files: dict[str, str], paint: Callable) -> None:
    """Those that are on, in order, at their strengths, after what comes in; bit for bit."""
    a, b, c = files["flux_kohya"], files["flux_split"], files["flux_kohya_2"]
    graph, other = Graph(), Graph()
    first = graph.add("LegoMoLE_LoRAList", loras=rows(row(a, 0.5), row(c, on=False)))
    stack = graph.add("LegoMoLE_LoRAList", loras=rows(row(b, -0.7)), lora_stack=first)
    loaded = [other.load(a, 0.5, 0.5), other.load(b, -0.7, -0.7)]
    found = paint(graph, graph.picture(*graph.apply(graph.merge("concat", stack))))
    expected = paint(other, other.picture(*other.apply(other.merge("concat", *loaded))))
    assert torch.equal(found[1], expected[1])


def test_trigger_words_one_line_per_lora(comfy: Server, files: dict[str, str]) -> None:
    tensors = load_file(comfy.loras / files["flux_kohya"])
    for name, phrase in (("said", "ember style, burning"), ("unsaid", "")):
        save_file(tensors, comfy.loras / f"{name}.safetensors", {"modelspec.trigger_phrase": phrase})
    graph = Graph()
    node, _ = graph.add("LegoMoLE_LoRAList", loras=rows(row("unsaid.safetensors"), row("said.safetensors")))
    graph.add("PreviewAny", source=[node, 1])
    shown = comfy.run(graph.nodes).outputs["PreviewAny0"]["text"]
    assert shown == ["\nember style, burning"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "This is not a list of LoRAs"),
        ('[{"on": true}]', "loras 0.name"),
        ('[{"name": "a", "strength": 1e400}]', "loras 0.strength"),
        ('[{"name": "a", "strength": 101}]', "loras 0.strength"),
        ('[{"name": "../../x.safetensors"}]', "There is no such LoRA"),
        ('[{"name": "gone.safetensors"}]', "gone.safetensors"),
    ],
)
def test_wrong_lists_are_refused_by_name(comfy: Server, text: str, words: str) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=graph.add("LegoMoLE_LoRAList", loras=text))
    assert words in comfy.fail(graph.nodes)


def test_changed_file_runs_again(comfy: Server, files: dict[str, str]) -> None:
    file = comfy.loras / "changing.safetensors"
    tensors = load_file(comfy.loras / files["flux_kohya"])
    save_file(tensors, file, {"modelspec.trigger_phrase": "one"})
    graph = Graph()
    node, _ = graph.add("LegoMoLE_LoRAList", loras=rows(row(file.name)))
    graph.add("PreviewAny", source=[node, 1])
    assert comfy.run(graph.nodes).outputs["PreviewAny0"]["text"] == ["one"]
    assert node not in comfy.run(graph.nodes).executed
    save_file(tensors, file, {"modelspec.trigger_phrase": "another"})
    assert comfy.run(graph.nodes).outputs["PreviewAny0"]["text"] == ["another"]


def test_page_asks_for_names_and_what_files_say(comfy: Server, files: dict[str, str]) -> None:
    assert files["flux_kohya"] in comfy.get("/legomole/loras")
    file = comfy.loras / "talks.safetensors"
    said = {"modelspec.thumbnail": PICTURE, "ss_base_model_version": "flux1", "modelspec.trigger_phrase": "<b>x</b>"}
    save_file({"a": torch.zeros(1)}, file, said)
    assert comfy.get("/legomole/lora?name=talks.safetensors") == {
        "title": "", "base": "flux1", "words": ["<b>x</b>"], "thumbnail": PICTURE,
    }  # fmt: skip
    file.write_bytes(b"broken")  # the answer is that of the file as it is now
    assert "talks.safetensors" in comfy.get("/legomole/lora?name=talks.safetensors")["error"]
    for name in ("gone.safetensors", "../checkpoints/sd15_nano.safetensors", "/etc/passwd", ""):
        assert "There is no such LoRA" in comfy.get(f"/legomole/lora?name={quote(name)}")["error"]


def test_mix_tells_the_page_its_gates_while_it_samples(comfy: Server, files: dict[str, str]) -> None:
    """Live messages name the node, the LoRAs, the parts and their gates."""
    graph = Graph()
    mix = graph.mix(graph.load(files["flux_kohya"], 0.5), graph.load(files["flux_split"]), granularity="block")
    graph.picture(mix)
    run = comfy.run(graph.nodes)
    labels = ["flux_kohya", "flux_split"]
    assert run.outputs[mix[0]]["experts"] == labels
    told = [data for kind, data in comfy.messages if kind == "legomole.gates" and data["node"] == mix[0]]
    assert told
    assert told[-1]["labels"] == labels
    assert len(told[-1]["scopes"]) == len(told[-1]["gates"]) > 1
    assert all(row == [1.0, 1.0] for row in told[-1]["gates"])  # even gates: each at its own strength
