"""The shipped workflows in the real page: they open whole and run."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from legomole.nano.oracle import judge
from legomole.nano.store import Store

from ..comfy.nano import EMBER, HEART, NanoGraph
from ..comfy.server import Server
from .browser import open_workflow, opened

pytestmark = [pytest.mark.comfy, pytest.mark.page]

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))

# The workflows run as they are; only these would take a minute.
SIZES = {
    "LegoMoLE_TrainGates": {200: 8, 256: 16, 32: 8},  # steps, examples, pictures
    "LegoMoLE_XYCompare": {12: 2},  # steps
}


# What the nodes say after a run.
TEXTS = {
    "LegoMoLE_LegoMerge": "lego: 2 LoRAs",
    "LegoMoLE_LoRAReport": "hardly touch each other",
    "LegoMoLE_SaveLoRA": "_00001_.safetensors",
    "LegoMoLE_TrainGates": "gates for legomole_nano_ember, legomole_nano_heart",
    "LegoMoLE_MoLEMix": "mix of ",
    "LegoMoLE_SaveGates": ".safetensors",
    "LegoMoLE_LoadGates": "gates per block",
    "LegoMoLE_XYCompare": "20 cells, 20 sampled in ",
}


# Where the picture of LEGO's merge is saved: it shows a heart in ember style.
LEGO = {"style_plus_subject": "14", "compare_methods": "15"}


def chosen(path: Path) -> dict[str, Any]:
    """A workflow as shipped, but for `SIZES`."""
    workflow = json.loads(path.read_text())
    for node in workflow["nodes"]:
        swap = SIZES.get(node["type"], {})
        node["widgets_values"] = [swap.get(value, value) for value in node.get("widgets_values", [])]
    return workflow


@pytest.fixture(scope="module")
def gates(comfy: Server, nano: Path) -> None:
    """The gates that a workflow loads, made before the page asks what there is."""
    for path in (comfy.base / "models" / "legomole_gates").glob("gates_*"):
        path.unlink()
    graph = NanoGraph()
    trained = graph.train(graph.load(EMBER), graph.load(HEART), objective="router", latent_image=graph.empty(128))
    graph.add("LegoMoLE_SaveGates", gates=trained, filename_prefix="gates")
    comfy.run(graph.nodes)


@pytest.fixture(scope="module")
def page(comfy: Server, gates: None) -> Iterator[Any]:
    with opened(comfy) as tab:
        yield tab


def texts_on(page: Any, kind: str) -> list[str]:
    """What the nodes of a kind show their user after a run."""
    return page.evaluate(
        """kind => app.graph.nodes.filter(node => node.type === kind).map(
            node => node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? 'nothing')""",
        kind,
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_whole_and_runs(comfy: Server, page: Any, path: Path) -> None:
    workflow = chosen(path)
    open_workflow(page, workflow)
    unknown = page.evaluate("() => app.graph.nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])")
    assert unknown == []
    assert page.evaluate("() => app.graph.nodes.length") == len(workflow["nodes"])
    assert page.evaluate("() => Object.keys(app.graph.links).length") == len(workflow["links"])

    with page.expect_response("**/prompt") as answer:
        page.evaluate("() => app.queuePrompt(0, 1)")
    body = answer.value.json()
    assert body.get("node_errors") == {}, body
    done = comfy.history(body["prompt_id"])
    assert done["status"]["status_str"] == "success", done["status"]
    shows_pictures = ("SaveImage", "PreviewImage", "LegoMoLE_GateMap", "LegoMoLE_LoRAReport", "LegoMoLE_XYCompare")
    pictures = [str(node["id"]) for node in workflow["nodes"] if node["type"] in shows_pictures]
    assert {node for node, output in done["outputs"].items() if output.get("images")} == set(pictures)
    for kind, text in TEXTS.items():
        for shown in texts_on(page, kind):
            assert text in shown
    if path.stem in LEGO:
        painted = torch.stack([pixels(comfy, entry) for entry in done["outputs"][LEGO[path.stem]]["images"]])
        assert judge(Store().oracle, painted, [("heart", "ember")] * 4).both.sum() >= 3


def pixels(comfy: Server, entry: dict[str, str]) -> torch.Tensor:
    """``(3, H, W)`` in [-1, 1] of a picture that was saved."""
    with Image.open(comfy.base / "output" / entry["subfolder"] / entry["filename"]) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_keeps_what_was_saved(page: Any, path: Path) -> None:
    """Widgets land where they were, at their size: opened and saved again, the workflow says the same."""
    workflow = chosen(path)
    open_workflow(page, workflow)
    again = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    told = lambda node: (node["type"], node.get("widgets_values", []), [*map(round, node["size"])])  # noqa: E731
    assert {node["id"]: told(node) for node in again["nodes"]} == {node["id"]: told(node) for node in workflow["nodes"]}


def test_workflows_are_offered_as_templates(comfy: Server) -> None:
    """Under their names, each with its picture."""
    assert sorted(comfy.get("/workflow_templates")["legomole"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        with urllib.request.urlopen(f"{comfy.url}/api/workflow_templates/legomole/{path.stem}.jpg", timeout=60) as got:
            assert got.headers["Content-Type"] == "image/jpeg"


def test_loras_row_grows(page: Any) -> None:
    """Connecting the last socket brings the next."""
    names = page.evaluate(
        """async () => {
            app.graph.clear();
            const merge = LiteGraph.createNode('LegoMoLE_LegoMerge');
            app.graph.add(merge);
            const seen = [];
            for (let i = 0; i < 3; i++) {
                seen.push(merge.inputs.filter(x => x.name.startsWith('loras.')).length);
                const load = LiteGraph.createNode('LegoMoLE_LoadLoRA');
                app.graph.add(load);
                load.connect(0, merge, merge.inputs.findIndex(x => x.name === `loras.lora${i}`));
                await new Promise(resolve => setTimeout(resolve, 50));
            }
            return seen;
        }"""
    )
    assert names[1:] == [2, 3]


def test_choosing_a_method_brings_its_widgets(comfy: Server, page: Any) -> None:
    """And the prompt the page sends then holds their values."""
    info = comfy.get("/object_info/LegoMoLE_MergeLoRAs")["LegoMoLE_MergeLoRAs"]
    for option in info["input"]["required"]["method"][1]["options"]:
        wanted = {f"method.{name}" for name in option["inputs"]["required"]}
        sent = page.evaluate(
            """async method => {
                app.graph.clear();
                const merge = LiteGraph.createNode('LegoMoLE_MergeLoRAs');
                app.graph.add(merge);
                const choice = merge.widgets.find(widget => widget.name === 'method');
                choice.value = method;
                choice.callback?.(method, app.canvas, merge);
                await new Promise(resolve => setTimeout(resolve, 50));
                return Object.values((await app.graphToPrompt()).output)[0].inputs;
            }""",
            option["key"],
        )
        assert sent["method"] == option["key"]
        assert {name for name in sent if name.startswith("method.")} == wanted
