"""Bring the shipped workflows up to date after the inputs of nodes changed: `python docs/images/templates.py`.

Opens each workflow in a real ComfyUI page, and writes the values of widgets and the sizes of nodes as the page saves
them. Values are taken by the names of widgets; new widgets have their default. Nodes get room for their reports, groups
for their nodes. Needs a ComfyUI and a Chromium, as the tests in tests/page do.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from legomole.nano.comfyui import place
from legomole.tests.comfy.server import Server, find, lay_out
from legomole.tests.page.browser import open_workflow, opened

ROOT = Path(__file__).parents[2]
# Nodes that show a report of several lines, which takes as much height (MAX_HEIGHT in web/report.js).
REPORTING = ("LegoMoLE_LegoMerge", "LegoMoLE_MoLEMix", "LegoMoLE_TrainGates")
RESIZED = ("LegoMoLE_MergeLoRAs",)  # also one, but the page makes it as small as it can when it loads its method
REPORT_HEIGHT, TITLE, MARGIN = 168, 30, 24  # pixels

NODES = "() => JSON.parse(JSON.stringify(app.graph.serialize())).nodes"

Box = tuple[float, float, float, float]  # left, top, right, bottom


def main() -> None:
    comfyui = find()
    if isinstance(comfyui, str):
        raise SystemExit(comfyui)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        lay_out(base, ROOT)
        place(base)
        gates = base / "models" / "legomole_gates"
        gates.mkdir()
        (gates / "gates_00001_.safetensors").touch()  # listed in the combo of Load Gates
        comfy = Server(*comfyui, base)
        try:
            with opened(comfy) as page:
                for path in sorted((ROOT / "workflows").glob("*.json")):
                    update(page, path)
        finally:
            comfy.close()


def update(page: Any, path: Path) -> None:
    workflow = json.loads(path.read_text())
    before = json.dumps(workflow)
    open_workflow(page, workflow)
    page.evaluate(
        """values => {
            for (const node of app.graph.nodes) {
                const named = values[node.id], fresh = LiteGraph.createNode(node.type);
                for (const widget of named && node.widgets || []) {
                    const other = fresh.widgets.find(({ name }) => name === widget.name);
                    if (widget.name in named) widget.value = named[widget.name];
                    else if (other && widget.serialize !== false) widget.value = other.value;
                }
            }
        }""",
        {str(node["id"]): node.get("widgets_values_named") for node in workflow["nodes"]},
    )
    values = {node["id"]: node for node in page.evaluate(NODES)}
    for node in workflow["nodes"]:
        for key in ("widgets_values", "widgets_values_named"):
            if key in node and key in values[node["id"]]:
                node[key] = values[node["id"]][key]
    open_workflow(page, workflow)  # again: the page sizes nodes when it loads their values
    least = page.evaluate("() => Object.fromEntries(app.graph.nodes.map(node => [node.id, node.computeSize()[1]]))")
    sizes = {node["id"]: node["size"] for node in page.evaluate(NODES)}
    for node in workflow["nodes"]:
        if [*map(round, sizes[node["id"]])] != [*map(round, node["size"])]:
            node["size"] = sizes[node["id"]]
        if node["type"] in REPORTING:
            node["size"][1] = max(node["size"][1], least[str(node["id"])] + REPORT_HEIGHT)
    separate(workflow["nodes"])
    for i in range(len(workflow.get("groups", []))):
        make_room(workflow, i)
    if json.dumps(workflow) != before:
        path.write_text(json.dumps(workflow, ensure_ascii=False, indent=2) + "\n")
        print(f"{path.name} updated")


def separate(nodes: list[dict[str, Any]]) -> None:
    """Move nodes down that others have grown into."""
    for upper in sorted(nodes, key=lambda node: node["pos"][1]):
        left, top, right, bottom = box(upper)
        for node in nodes:
            x, y, end, _ = box(node)
            if top < y < bottom + TITLE and x < right and left < end:
                node["pos"][1] = bottom + TITLE + MARGIN


def make_room(workflow: dict[str, Any], i: int) -> None:
    """Extend a group to the bottom of its nodes, and move down what lies below it."""
    group = workflow["groups"][i]
    frame = box(group)
    bottom = max((box(node)[3] for node in inside(workflow["nodes"], frame)), default=0.0) + MARGIN
    delta = bottom - frame[3]
    if delta <= 0:
        return
    below = [other for other in workflow["groups"] if is_below(box(other), frame)]
    nodes = [node for node in workflow["nodes"] if is_below(box(node), frame)]
    nodes += [node for other in below for node in inside(workflow["nodes"], box(other))]
    for item in below:
        item["bounding"][1] += delta
    for node in {node["id"]: node for node in nodes}.values():
        node["pos"][1] += delta
    group["bounding"][3] += delta


def box(item: dict[str, Any]) -> Box:
    """Return the rectangle of a node, with its report, or of a group."""
    x, y, width, height = item["bounding"] if "bounding" in item else (*item["pos"], *item["size"])
    return x, y, x + width, y + height + REPORT_HEIGHT * (item.get("type") in RESIZED)


def inside(nodes: list[dict[str, Any]], frame: Box) -> list[dict[str, Any]]:
    """Return the nodes whose upper left corner is in a rectangle."""
    return [n for n in nodes if frame[0] <= n["pos"][0] < frame[2] and frame[1] <= n["pos"][1] < frame[3]]


def is_below(other: Box, frame: Box) -> bool:
    return other[1] >= frame[3] and other[0] < frame[2] and frame[0] < other[2]


if __name__ == "__main__":
    main()
