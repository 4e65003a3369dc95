"""LoRA Report in a real graph: image, summary and page; file names stay inside the output folder."""

from __future__ import annotations

from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from .graph import Graph, Link
from .server import Server

pytestmark = pytest.mark.comfy


def report(graph: Graph, *loras: Link, with_model: bool = True, **settings: Any) -> Link:
    host = {"model": graph.model, "clip": graph.clip} if with_model else {}
    defaults = {"rank": "1x", "filename_prefix": "test/report"}
    row = {f"loras__lora{i}": lora for i, lora in enumerate(loras)}
    return graph.add("LegoMoLE_LoRAReport", **row, **host, **{**defaults, **settings})


def test_report_of_one_lora_twice(comfy: Server, files: dict[str, str]) -> None:
    """At strengths 1 and -2 a LoRA works against itself in every block."""
    graph = Graph()
    node = report(graph, graph.load(files["flux_kohya"]), graph.load(files["flux_kohya"], -2.0, -2.0))
    graph.add("SaveImage", images=node, filename_prefix="test/report")
    text = {"class_type": "PreviewAny", "inputs": {"source": [node[0], 1]}}
    run = comfy.run({**graph.nodes, "text": text})
    assert "work against each other (cosine -1.00)" in run.outputs["text"]["text"][0]
    assert run.outputs[node[0]]["images"]
    shown = run.outputs[node[0]]["text"][0]
    assert shown.startswith(run.outputs["text"]["text"][0])
    page = comfy.base / "output" / "test" / "report_00001_.html"
    assert str(page) in shown
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    saved = run.outputs["SaveImage0"]["images"][0]
    with Image.open(comfy.base / "output" / saved["subfolder"] / saved["filename"]) as picture:
        assert picture.width == 1590


def test_report_without_a_model_and_without_a_page(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    name = report(graph, graph.load(files["flux_kohya"]), with_model=False, filename_prefix="")[0]
    run = comfy.run({node: value for node, value in graph.nodes.items() if "Loader" not in value["class_type"]})
    assert ".html" not in run.outputs[name]["text"][0]


@pytest.mark.parametrize("with_model", [True, False])
def test_nan_is_a_finding_and_a_merge_refuses_it(comfy: Server, files: dict[str, str], with_model: bool) -> None:
    folder = comfy.base / "models" / "loras"
    state = load_file(folder / files["flux_kohya"])
    key = next(key for key in state if key.endswith("lora_up.weight"))
    state[key][0, 0] = float("nan")
    save_file(state, folder / "broken.safetensors")
    graph = Graph()
    name = report(graph, graph.load("broken.safetensors"), with_model=with_model, filename_prefix="")[0]
    text = comfy.run(graph.nodes).outputs[name]["text"][0]
    assert text.startswith("\N{LARGE RED CIRCLE} broken: broken contains NaN")
    graph = Graph()
    graph.add(
        "PreviewAny", source=[graph.merge("concat", graph.load("broken.safetensors"), with_model=with_model)[0], 1]
    )
    assert "NaN" in comfy.fail(graph.nodes)


def test_wrong_values_have_their_own_errors(comfy: Server, files: dict[str, str]) -> None:
    for settings, message in (
        ({"filename_prefix": "../outside"}, "A report can only be saved inside the output folder."),
        ({"rank": "many"}, "This is not a rank."),
    ):
        graph = Graph()
        report(graph, graph.load(files["flux_kohya"]), **settings)
        assert message in comfy.fail(graph.nodes)
