"""Take the screenshots of docs/comfyui.md and draw the thumbnails of templates: `python docs/images/comfyui.py`.

Takes some minutes. Runs the shipped workflows in a real ComfyUI page. Needs a ComfyUI and a Chromium, as the tests
in tests/page do.
"""

from __future__ import annotations

import io
import json
import tempfile
from pathlib import Path
from typing import Any

from legomole.nano.comfyui import place
from legomole.tests.comfy.server import Server, find
from legomole.tests.page.browser import open_workflow, opened
from PIL import Image, ImageOps

ROOT = Path(__file__).parents[2]
OUT = Path(__file__).parent / "comfyui"
WORKFLOWS = (
    "style_plus_subject",
    "compare_loras",
    "xy_compare",
    "mix_by_words",
    "two_subjects_by_regions",
    "regions_by_prompt_areas",
    "train_gates",
    "switch_loras_on_and_off",
)
# Templates whose thumbnail is drawn here -> node types between which it shows the graph, above the sampled images.
THUMBNAILS = {
    "style_plus_subject": ("UNETLoader", "LegoMoLE_LegoMerge"),
    "mix_by_words": ("LegoMoLE_MoLEMix", "SaveImage"),
    "two_subjects_by_regions": ("LegoMoLE_Region", "SaveImage"),
    "regions_by_prompt_areas": ("LegoMoLE_MoLEMix", "SaveImage"),
    "train_gates": ("LegoMoLE_MoLEMix", "LegoMoLE_GateMap"),
    "switch_loras_on_and_off": ("LegoMoLE_MoLEMix", "SaveImage"),
}
THUMBNAIL = 480  # pixels
SIZE = (1500, 940)


def screenshot(page: Any, crop: tuple[int, int, int, int] | None = None) -> Image.Image:
    page.wait_for_timeout(700)
    with Image.open(io.BytesIO(page.screenshot())) as picture:
        return picture.crop(crop or (0, 0, *SIZE)).convert("RGB")


def save(page: Any, name: str, crop: tuple[int, int, int, int] | None = None) -> None:
    screenshot(page, crop).save(OUT / f"{name}.jpg", quality=72, optimize=True)


def save_thumbnail(page: Any, comfy: Server, name: str, outputs: dict[str, Any]) -> None:
    """Draw a part of the graph above four of its images: of each SaveImage node the first, or all of a single one."""
    zoom_to(page, *THUMBNAILS[name])
    canvas = Image.new("RGB", (THUMBNAIL, THUMBNAIL), "#1e1e1e")
    canvas.paste(ImageOps.fit(screenshot(page, (60, 75, 1060, 875)), (THUMBNAIL, THUMBNAIL * 3 // 4), centering=(0, 0)))
    in_order = [outputs[node] for node in sorted(outputs, key=int)]
    saved = [output["images"] for output in in_order if output.get("images", [{}])[0].get("type") == "output"]
    chosen = [images[0] for images in saved] if len(saved) > 1 else saved[0]
    side = THUMBNAIL // 4
    for i, entry in enumerate(chosen[:4]):
        with Image.open(comfy.base / "output" / entry["subfolder"] / entry["filename"]) as picture:
            canvas.paste(picture.convert("RGB").resize((side, side)), (side * i, THUMBNAIL - side))
    canvas.save(ROOT / "workflows" / f"{name}.jpg", quality=80, optimize=True)


def run(page: Any, comfy: Server) -> dict[str, Any]:
    """Press the Run button, wait until the prompt has finished, and return its outputs."""
    with page.expect_response("**/prompt") as answer:
        page.get_by_test_id("queue-button").click()
    history = comfy.history(answer.value.json()["prompt_id"], timeout=600)
    page.wait_for_timeout(2500)  # for the images to load
    return history["outputs"]


def fit_view(page: Any) -> None:
    page.evaluate("() => app.extensionManager.command.execute('Comfy.Canvas.FitView')")
    page.wait_for_timeout(800)


def zoom_to(page: Any, first: str, last: str) -> None:
    """Show the nodes between two corners: the first node of type `first`, top left, and of `last`, bottom right."""
    page.evaluate(
        """([first, last]) => {
            const [a, b] = [first, last].map(type => app.graph.nodes.find(node => node.type === type));
            const width = b.pos[0] + b.size[0] - a.pos[0] + 60, height = b.pos[1] + b.size[1] - a.pos[1] + 90;
            const view = app.canvas.canvas.getBoundingClientRect();
            app.canvas.ds.scale = Math.min((view.width - 120) / width, (view.height - 130) / height, 1);
            app.canvas.ds.offset = [60 / app.canvas.ds.scale - a.pos[0] + 30, 90 / app.canvas.ds.scale - a.pos[1] + 50];
            app.canvas.setDirty(true, true);
        }""",
        [first, last],
    )


def main() -> None:
    comfyui = find()
    if isinstance(comfyui, str):
        raise SystemExit(comfyui)
    OUT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder)
        for part in ("custom_nodes", "models"):
            (base / part).mkdir()
        (base / "custom_nodes" / "legomole").symlink_to(ROOT, target_is_directory=True)
        place(base)
        comfy = Server(*comfyui, base)
        try:
            with opened(comfy, SIZE) as page:
                draw(page, comfy)
        finally:
            comfy.close()


def draw(page: Any, comfy: Server) -> None:
    for name, value in (("Comfy.Minimap.Visible", False), ("LiteGraph.Canvas.MinFontSizeForLOD", 0)):
        page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
    for name in WORKFLOWS:
        if name == "switch_loras_on_and_off":  # only a page loaded later lists the gates saved by train_gates
            page.reload()
            page.wait_for_function("() => window.app?.graph && LiteGraph.registered_node_types.LegoMoLE_LegoMerge")
            page.wait_for_timeout(3000)  # the page restores the workflow that was open
        open_workflow(page, json.loads((ROOT / "workflows" / f"{name}.json").read_text()))
        fit_view(page)
        outputs = run(page, comfy)
        fit_view(page)
        save(page, name)
        if name in THUMBNAILS:
            save_thumbnail(page, comfy, name, outputs)
        if name == "train_gates":
            zoom_to(page, "LegoMoLE_MoLEMix", "LegoMoLE_GateMap")
            save(page, "nodes", crop=(60, 75, 1060, 875))
    open_workflow(page, {"nodes": [], "links": [], "version": 0.4})
    page.evaluate(
        """() => {
            const list = LiteGraph.createNode('LegoMoLE_LoRAList'), show = LiteGraph.createNode('PreviewAny');
            for (const [node, x] of [[list, 150], [show, 620]]) { app.graph.add(node); node.pos = [x, 150]; }
            list.widgets[0].value = JSON.stringify([{name: 'gone.safetensors', on: true, strength: 1}]);
            list.connect(1, show, 0);
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [0, 0];
            app.queuePrompt(0, 1);
        }"""
    )
    page.get_by_role("button", name="View details").click()
    save(page, "error")
    page.evaluate("() => app.extensionManager.command.execute('Comfy.BrowseTemplates')")
    page.get_by_text("legomole", exact=True).first.click()
    page.wait_for_timeout(1500)
    save(page, "templates")


if __name__ == "__main__":
    main()
