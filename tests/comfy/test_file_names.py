"""File names in graphs from other computers, and inputs that are named wrongly in prompts over HTTP."""

from __future__ import annotations

import json
import shutil

import pytest

from .graph import Graph
from .server import Refused, Server

pytestmark = pytest.mark.comfy


@pytest.fixture
def styles(comfy: Server, files: dict[str, str]) -> str:
    """A LoRA in a subfolder; returns its name on Windows."""
    (comfy.loras / "styles").mkdir(exist_ok=True)
    shutil.copy(comfy.loras / files["flux_kohya"], comfy.loras / "styles" / "inky.safetensors")
    return "styles\\inky.safetensors"


def report(comfy: Server, graph: Graph, lora: list) -> str:
    merged = graph.merge("concat", lora)
    graph.add("PreviewAny", source=[merged[0], 1])
    return comfy.run(graph.nodes).outputs["PreviewAny0"]["text"][0]


@pytest.mark.parametrize("node", ["file", "list"])
def test_a_path_from_windows_is_the_same_file(comfy: Server, styles: str, node: str) -> None:
    graph = Graph()
    rows = json.dumps([{"name": styles, "on": True, "strength": 0.5}])
    text = report(
        comfy, graph, graph.load(styles, 0.5) if node == "file" else graph.add("LegoMoLE_LoRAList", loras=rows)
    )
    assert "[1] inky: weight 0.5" in text
    assert "note:" not in text


@pytest.mark.parametrize("name", ["D:\\a\\inky.safetensors", "../a/inky.safetensors", "/a/inky.safetensors"])
def test_a_name_that_leaves_the_folder_is_refused(comfy: Server, styles: str, name: str) -> None:
    graph = Graph()
    graph.save(graph.load(name), "refused/x")
    with pytest.raises(Refused, match=r"There is no such LoRA\."):
        comfy.queue(graph.nodes)


def test_a_moved_file_is_found_by_its_name_and_that_is_noted(comfy: Server, styles: str) -> None:
    graph = Graph()
    lora = graph.load("old folder\\inky.safetensors")
    text = report(comfy, graph, lora)
    note = "note: old folder\\inky.safetensors is not in the loras folder"
    assert "[1] inky: weight 1" in text
    assert note in text
    graph = Graph()
    mix = graph.mix(graph.load("old folder\\inky.safetensors", 0.25))
    graph.picture(mix)
    outputs = comfy.run(graph.nodes).outputs
    assert note in outputs[mix[0]]["text"][0]
    assert outputs["LegoMoLE_LoadLoRA0"]["text"][0].startswith(note)


def test_of_several_moved_files_none_is_chosen(comfy: Server, styles: str) -> None:
    for folder in ("left", "right"):
        (comfy.loras / folder).mkdir(exist_ok=True)
        shutil.copy(comfy.loras / "styles" / "inky.safetensors", comfy.loras / folder / "twice.safetensors")
    graph = Graph()
    graph.save(graph.load("gone\\twice.safetensors"), "refused/x")
    with pytest.raises(Refused, match=r"several files of that name: left/twice\.safetensors, right/twice\.safetensors"):
        comfy.queue(graph.nodes)


def test_missing_gates_are_refused_before_the_prompt_runs(comfy: Server) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=graph.add("LegoMoLE_LoadGates", gates_name="missing.safetensors"))
    with pytest.raises(Refused, match=r"There are no such gates\.[\s\S]*missing\.safetensors"):
        comfy.queue(graph.nodes)


def test_a_wrong_input_name_is_reported(comfy: Server, files: dict[str, str]) -> None:
    """``lora0`` for ``loras.lora0``; ComfyUI passes links with any name on."""
    for build in (
        lambda g, lora: g.picture(g.mix(lora)),
        lambda g, lora: g.save(g.lego(lora), "refused/x"),
        lambda g, lora: g.save(g.merge("concat", lora), "refused/x"),
        lambda g, lora: g.picture(g.mix(lora, gates=g.train(lora))),
    ):
        graph = Graph()
        build(graph, graph.load(files["flux_kohya"]))
        for node in graph.nodes.values():
            if "loras.lora0" in node["inputs"]:
                node["inputs"]["lora0"] = node["inputs"].pop("loras.lora0")
        run = comfy.wait(comfy.queue(graph.nodes))
        assert "The node has no such input." in (run.error or "")
        assert "loras.lora0" in (run.error or "")
        assert run.of("execution_error")[0]["exception_type"] == "legomole.MergeError"  # and not the path of a folder
