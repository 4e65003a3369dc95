"""The subgraph blueprints and the app template, as files: ComfyUI lists them, and their graphs fit the nodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from .graph import Graph
from .server import Prompt, Server

pytestmark = pytest.mark.comfy

ROOT = Path(__file__).parents[2]
BLUEPRINTS = sorted((ROOT / "subgraphs").glob("*.json"))
APPS = sorted((ROOT / "workflows").glob("*.app.json"))


def flattened(subgraph: dict[str, Any], given: dict[str, list[Any]], widgets: dict[str, Any]) -> Prompt:
    """Return the nodes of a subgraph in ComfyUI's API format.

    Args:
        subgraph: The definition.
        given: Name of an input of the subgraph -> link.
        widgets: Other values of widgets, by name.
    """
    links = {link["id"]: link for link in subgraph["links"]}
    prompt: Prompt = {}
    for node in subgraph["nodes"]:
        inputs: dict[str, Any] = {k: widgets.get(k, v) for k, v in node["widgets_values_named"].items()}
        for position, socket in enumerate(node["inputs"]):
            link = links.get(socket["link"])
            if link is None:
                continue
            assert link["target_slot"] == position
            if link["origin_id"] == -10:
                inputs[socket["name"]] = given[subgraph["inputs"][link["origin_slot"]]["name"]]
            else:
                inputs[socket["name"]] = [f"inner{link['origin_id']}", link["origin_slot"]]
        prompt[f"inner{node['id']}"] = {"class_type": node["type"], "inputs": inputs}
    return prompt


@pytest.mark.parametrize("path", BLUEPRINTS, ids=lambda path: path.stem)
def test_blueprint_is_listed_and_runs(comfy: Server, files: dict[str, str], path: Path) -> None:
    listed = [entry for entry in comfy.get("/global_subgraphs").values() if entry["name"] == path.stem]
    assert [entry["info"]["node_pack"] for entry in listed] == ["custom_nodes.legomole"]
    workflow = json.loads(path.read_text())
    (subgraph,) = workflow["definitions"]["subgraphs"]
    (outer,) = workflow["nodes"]
    assert outer["type"] == subgraph["id"]
    nodes = {str(node["id"]): node for node in subgraph["nodes"]}
    for node, widget in outer["properties"]["proxyWidgets"]:
        assert widget in nodes[node]["widgets_values_named"]
    for node in subgraph["nodes"]:
        info = comfy.get(f"/object_info/{node['type']}")[node["type"]]
        assert [output["name"] for output in node["outputs"]] == info["output_name"]

    graph = Graph()
    first, second = graph.load(files["flux_kohya"]), graph.load(files["flux_split"])
    stack = [graph.load(files["flux_split"])[0], 1]
    graph.nodes[stack[0]]["inputs"]["lora_stack"] = [first[0], 1]
    given = {"model": graph.model, "clip": graph.clip, "lora0": first, "lora1": second, "loras": stack}
    given["latent_image"] = graph.empty()
    short = {"steps": 2, "pictures": 4, "examples": 8, "sampling_steps": 1, "reads": "hidden"}
    texts = {"words": "ember style\nheart", "prompts": "ember style\nheart\nheart in ember style\na dog"}
    prompt = flattened(subgraph, given, {**short, **texts})
    (model,) = [link for link in subgraph["links"] if link["target_id"] == -20 and link["target_slot"] == 0]
    graph.picture([f"inner{model['origin_id']}", model["origin_slot"]])
    run = comfy.run(graph.nodes | prompt)
    assert run.outputs["SaveImage0"]["images"]


@pytest.mark.parametrize("path", APPS, ids=lambda path: path.stem)
def test_app_offers_widgets_that_exist(path: Path) -> None:
    workflow = json.loads(path.read_text())
    nodes = {str(node["id"]): node for node in workflow["nodes"]}
    app = workflow["extra"]["linearData"]
    assert workflow["extra"]["linearMode"] is True
    assert all(widget in nodes[node]["widgets_values_named"] for node, widget in app["inputs"])
    assert [nodes[node]["type"] for node in app["outputs"]] == ["SaveImage"]


@pytest.mark.parametrize("path", sorted((ROOT / "workflows").glob("*.json")), ids=lambda path: path.stem)
def test_template_has_a_picture_and_a_note_of_three_steps(path: Path) -> None:
    assert path.with_suffix(".jpg").exists()
    (note,) = [node for node in json.loads(path.read_text())["nodes"] if node["type"] == "MarkdownNote"]
    lines = note["widgets_values"][0].splitlines()
    assert [line[:3] for line in lines if line[:1].isdigit()] == ["1. ", "2. ", "3. "]
