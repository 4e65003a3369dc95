"""The shipped workflows in the real page: they open completely and run."""

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

# Smaller values for widgets with which a run would take a minute.
SIZES = {
    "LegoMoLE_TrainGates": {200: 8, 256: 16, 32: 8},  # steps, examples, pictures
    "LegoMoLE_XYCompare": {12: 2},  # steps
}


# Texts that the nodes show after a run.
TEXTS = {
    "LegoMoLE_LegoMerge": "lego: ",
    "LegoMoLE_LoRAReport": "hardly touch each other",
    "LegoMoLE_SaveLoRA": "_00001_.safetensors",
    "LegoMoLE_TrainGates": "gates for legomole_nano_ember, legomole_nano_heart",
    "LegoMoLE_MoLEMix": "mix of ",
    "LegoMoLE_SaveGates": ".safetensors",
    "LegoMoLE_LoadGates": "gates per block",
    "LegoMoLE_XYCompare": "20 cells, 20 sampled in ",
}


# Id of the node that saves the image of LEGO's merge: a heart in ember style.
LEGO = {"style_plus_subject": "14", "compare_methods": "15"}


def shortened(path: Path) -> dict[str, Any]:
    """Load a workflow with the values of `SIZES`."""
    workflow = json.loads(path.read_text())
    for node in workflow["nodes"]:
        swap = SIZES.get(node["type"], {})
        node["widgets_values"] = [swap.get(value, value) for value in node.get("widgets_values", [])]
    return workflow


@pytest.fixture(scope="module")
def gates(comfy: Server, nano: Path) -> None:
    """The gates that a workflow loads; they must exist before the page reads the combo's options."""
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
    """Return the texts that the nodes of a kind show after a run."""
    return page.evaluate(
        """kind => app.graph.nodes.filter(node => node.type === kind).map(
            node => node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? 'nothing')""",
        kind,
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_completely_and_runs(comfy: Server, page: Any, path: Path) -> None:
    workflow = shortened(path)
    open_workflow(page, workflow)
    unknown = page.evaluate("() => app.graph.nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])")
    assert unknown == []
    assert page.evaluate("() => app.graph.nodes.length") == len(workflow["nodes"])
    assert page.evaluate("() => Object.keys(app.graph.links).length") == len(workflow["links"])

    with page.expect_response("**/prompt") as answer:
        page.evaluate("() => app.queuePrompt(0, 1)")
    body = answer.value.json()
    assert body.get("node_errors") == {}, body
    history = comfy.history(body["prompt_id"])
    assert history["status"]["status_str"] == "success", history["status"]
    shows_pictures = ("SaveImage", "PreviewImage", "LegoMoLE_GateMap", "LegoMoLE_LoRAReport", "LegoMoLE_XYCompare")
    pictures = [str(node["id"]) for node in workflow["nodes"] if node["type"] in shows_pictures]
    assert {node for node, output in history["outputs"].items() if output.get("images")} == set(pictures)
    for kind, text in TEXTS.items():
        for shown in texts_on(page, kind):
            assert text in shown
    if path.stem in LEGO:
        images = torch.stack([pixels(comfy, entry) for entry in history["outputs"][LEGO[path.stem]]["images"]])
        assert judge(Store().oracle, images, [("heart", "ember")] * 4).both.sum() >= 3


def pixels(comfy: Server, entry: dict[str, str]) -> torch.Tensor:
    """Return a saved image as ``(3, H, W)`` in -1 .. 1."""
    with Image.open(comfy.base / "output" / entry["subfolder"] / entry["filename"]) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_the_same_when_saved_again(page: Any, path: Path) -> None:
    """Values of widgets and sizes of nodes do not change when a workflow is opened and saved."""
    workflow = shortened(path)
    open_workflow(page, workflow)
    again = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    saved, expected = (
        {
            node["id"]: (node["type"], node.get("widgets_values", []), [*map(round, node["size"])])
            for node in version["nodes"]
        }
        for version in (again, workflow)
    )
    assert saved == expected


def test_workflows_are_offered_as_templates(comfy: Server) -> None:
    """Under their names, each with its thumbnail."""
    assert sorted(comfy.get("/workflow_templates")["legomole"]) == [path.stem for path in WORKFLOWS]
    for path in WORKFLOWS:
        url = f"{comfy.url}/api/workflow_templates/legomole/{path.stem}.jpg"
        with urllib.request.urlopen(url, timeout=60) as response:
            assert response.headers["Content-Type"] == "image/jpeg"


def test_row_of_loras_grows(page: Any) -> None:
    """Connecting the last socket adds another one."""
    counts = page.evaluate(
        """async () => {
            app.graph.clear();
            const merge = LiteGraph.createNode('LegoMoLE_LegoMerge');
            app.graph.add(merge);
            const counts = [];
            for (let i = 0; i < 3; i++) {
                counts.push(merge.inputs.filter(x => x.name.startsWith('loras.')).length);
                const load = LiteGraph.createNode('LegoMoLE_LoadLoRA');
                app.graph.add(load);
                load.connect(0, merge, merge.inputs.findIndex(x => x.name === `loras.lora${i}`));
                await new Promise(resolve => setTimeout(resolve, 50));
            }
            return counts;
        }"""
    )
    assert counts[1:] == [2, 3]


def test_choosing_a_method_shows_its_widgets(comfy: Server, page: Any) -> None:
    """The page's prompt then has their values."""
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
