"""Bring the shipped workflows up to date after the inputs of nodes changed: `python docs/images/templates.py`.

Opens each workflow in a real ComfyUI page, and writes the values of widgets and the sizes of nodes as the page saves
them. Values are taken by the names of widgets; new widgets have their default. Needs a ComfyUI and a Chromium, as the
tests in tests/page do.
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
    saved = page.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize())).nodes")
    by_id = {node["id"]: node for node in saved}
    for node in workflow["nodes"]:
        again = by_id[node["id"]]
        for key in ("widgets_values", "widgets_values_named"):
            if key in node and key in again:
                node[key] = again[key]
        if [round(x) for x in again["size"]] != [round(x) for x in node["size"]]:
            node["size"] = again["size"]
    if json.dumps(workflow) != before:
        path.write_text(json.dumps(workflow, ensure_ascii=False, indent=2) + "\n")
        print(f"{path.name} updated")


if __name__ == "__main__":
    main()
