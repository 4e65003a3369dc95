"""The shipped workflows in the real page: they open completely and run."""

from __future__ import annotations

import json
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("diffusers")

from legomole.nano.oracle import judge
from legomole.nano.store import Store

from ..comfy.server import Server
from .browser import open_workflow, settle

pytestmark = [pytest.mark.comfy, pytest.mark.page]

ROOT = Path(__file__).parents[2]
WORKFLOWS = sorted((ROOT / "workflows").glob("*.json"))
TRAINING = ROOT / "workflows" / "train_gates.json"

# Smaller values for widgets with which a run would take a minute.
SIZES = {
    "LegoMoLE_TrainGates": {200: 8, 256: 16, 32: 8, 12: 2},  # steps, examples, pictures, sampling steps
    "LegoMoLE_XYCompare": {12: 2},  # steps
    "KSampler": {12: 2},  # steps
}


# Texts that the nodes show after a run.
TEXTS = {
    "LegoMoLE_LegoMerge": "lego: ",
    "LegoMoLE_LoRAReport": "hardly touch each other",
    "LegoMoLE_SaveLoRA": "_00001_.safetensors",
    "LegoMoLE_TrainGates": "gates for legomole_nano_ember, legomole_nano_heart",
    "LegoMoLE_MoLEMix": "mix of ",
    "LegoMoLE_SaveGates": ".safetensors",
    "LegoMoLE_LoadGates": "gates per layer",
    "LegoMoLE_XYCompare": "20 cells, 20 sampled in ",
}


# Id of the node that saves the image of LEGO's merge: a heart in ember style, after all steps.
LEGO = {"style_plus_subject": "14", "compare_methods": "15"}
# Subject and style that the left and the right half of each image show; "" for any style but ember.
HALVES = {
    "two_subjects_by_regions": (("heart", ""), ("fish", "")),
    "regions_by_prompt_areas": (("heart", ""), ("star", "ember")),
}


def shortened(path: Path) -> dict[str, Any]:
    """Load a workflow with the values of `SIZES`; images that are looked at keep their steps."""
    workflow = json.loads(path.read_text())
    for node in workflow["nodes"]:
        swap = {} if path.stem in {*LEGO, *HALVES} and node["type"] == "KSampler" else SIZES.get(node["type"], {})
        node["widgets_values"] = [swap.get(value, value) for value in node.get("widgets_values", [])]
    return workflow


@dataclass
class Run:
    """A workflow opened and run in the page: what was seen of it."""

    unknown: list[str]
    nodes: int
    links: int
    answer: dict[str, Any]
    history: dict[str, Any]
    texts: dict[str, list[str]]
    collisions: list[list[str]]


# Pairs of nodes that overlap, and nodes that reach out of the group that their upper left corner is in.
COLLISIONS = """() => {
    const box = ({ pos: [x, y], size: [width, height] }, title = 30) => [x, y - title, x + width, y + height];
    const meet = (a, b) => a[0] < b[2] && b[0] < a[2] && a[1] < b[3] && b[1] < a[3];
    const nodes = app.graph.nodes.map(node => [node.title, box(node)]);
    const pairs = nodes.flatMap(([name, a], i) => nodes.slice(i + 1).filter(([, b]) => meet(a, b)).map(
        ([other]) => [name, other]));
    const out = app.graph.groups.flatMap(group => {
        const frame = box(group, 0);
        return nodes.filter(([, a]) => a[0] >= frame[0] && a[0] < frame[2] && a[1] >= frame[1] && a[1] < frame[3]
            && (a[2] > frame[2] || a[3] > frame[3])).map(([name]) => [name, group.title]); });
    return [...pairs, ...out]; }"""


def run(page: Any, comfy: Server, path: Path) -> Run:
    open_workflow(page, shortened(path))
    unknown = page.evaluate("() => app.graph.nodes.map(n => n.type).filter(t => !LiteGraph.registered_node_types[t])")
    nodes, links = page.evaluate("() => [app.graph.nodes.length, Object.keys(app.graph.links).length]")
    with page.expect_response("**/prompt") as answer:
        page.evaluate("() => app.queuePrompt(0, 1)")
    body = answer.value.json()
    history = comfy.history(body["prompt_id"]) if body.get("node_errors") == {} else {}
    settle(page)
    return Run(
        unknown, nodes, links, body, history, {kind: texts_on(page, kind) for kind in TEXTS}, page.evaluate(COLLISIONS)
    )


@pytest.fixture(scope="module")
def trained(comfy: Server, nano: Path, tab: Any) -> Run:
    """The run of the template that trains gates; another template loads the file that it saves."""
    for path in (comfy.base / "models" / "legomole_gates").glob("gates_*"):
        path.unlink()
    result = run(tab, comfy, TRAINING)
    tab.evaluate("() => app.refreshComboInNodes()")
    return result


@pytest.fixture(scope="module")
def page(tab: Any, trained: Run) -> Any:
    return tab


def texts_on(page: Any, kind: str) -> list[str]:
    """Return the texts that the nodes of a kind show after a run."""
    return page.evaluate(
        """kind => app.graph.nodes.filter(node => node.type === kind).map(
            node => node.widgets.find(widget => widget.name === '$$node-text-preview')?.value ?? 'nothing')""",
        kind,
    )


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_opens_completely_and_runs(comfy: Server, page: Any, trained: Run, path: Path) -> None:
    workflow = shortened(path)
    result = trained if path == TRAINING else run(page, comfy, path)
    assert result.unknown == []
    assert (result.nodes, result.links) == (len(workflow["nodes"]), len(workflow["links"]))
    assert result.answer.get("node_errors") == {}, result.answer
    history = result.history
    assert history["status"]["status_str"] == "success", history["status"]
    ours = ("LegoMoLE_GateMap", "LegoMoLE_LoRAReport", "LegoMoLE_XYCompare", "LegoMoLE_Region")
    shows_pictures = ("SaveImage", "PreviewImage", *ours)
    pictures = [str(node["id"]) for node in workflow["nodes"] if node["type"] in shows_pictures]
    assert {node for node, output in history["outputs"].items() if output.get("images")} == set(pictures)
    for kind, text in TEXTS.items():
        for shown in result.texts[kind]:
            assert text in shown
    assert result.collisions == []  # with the reports that the nodes show now
    if path.stem in LEGO:
        images = torch.stack([pixels(comfy, entry) for entry in history["outputs"][LEGO[path.stem]]["images"]])
        assert judge(Store().oracle, images, [("heart", "ember")] * 4).both.sum() >= 3
    if path.stem in HALVES:
        (saved,) = (output["images"] for output in history["outputs"].values() if len(output.get("images", ())) == 4)
        images = torch.stack([pixels(comfy, entry) for entry in saved])
        for half, (subject, style) in zip(images.chunk(2, -1), HALVES[path.stem], strict=True):
            verdict = judge(Store().oracle, half, [(subject, style or "ember")] * 4)
            assert verdict.subject.sum() >= 3
            assert verdict.style.sum() >= 3 if style else verdict.style.sum() <= 1


def pixels(comfy: Server, entry: dict[str, str]) -> torch.Tensor:
    """Return a saved image as ``(3, H, W)`` in -1 .. 1."""
    with Image.open(comfy.base / "output" / entry["subfolder"] / entry["filename"]) as picture:
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflow_is_the_same_when_saved_again(nano: Path, tab: Any, path: Path) -> None:
    """Values of widgets and sizes of nodes do not change when a workflow is opened and saved."""
    workflow = shortened(path)
    open_workflow(tab, workflow)
    again = tab.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
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


def test_row_of_loras_grows(tab: Any) -> None:
    """Connecting the last socket adds another one."""
    counts = tab.evaluate(
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
                for (let j = 0; j < 6; j++) await new Promise(next => requestAnimationFrame(next));
            }
            return counts;
        }"""
    )
    assert counts[1:] == [2, 3]


def test_choosing_a_method_shows_its_widgets(comfy: Server, tab: Any) -> None:
    """The page's prompt then has their values."""
    info = comfy.get("/object_info/LegoMoLE_MergeLoRAs")["LegoMoLE_MergeLoRAs"]
    for option in info["input"]["required"]["method"][1]["options"]:
        wanted = {f"method.{name}" for name in option["inputs"]["required"]}
        sent = tab.evaluate(
            """async method => {
                app.graph.clear();
                const merge = LiteGraph.createNode('LegoMoLE_MergeLoRAs');
                app.graph.add(merge);
                const choice = merge.widgets.find(widget => widget.name === 'method');
                choice.value = method;
                choice.callback?.(method, app.canvas, merge);
                for (let j = 0; j < 6; j++) await new Promise(next => requestAnimationFrame(next));
                return Object.values((await app.graphToPrompt()).output)[0].inputs;
            }""",
            option["key"],
        )
        assert sent["method"] == option["key"]
        assert {name for name in sent if name.startswith("method.")} == wanted
