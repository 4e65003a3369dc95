"""Our widgets in the real page, used by mouse and keyboard, in both renderers."""

from __future__ import annotations

import base64
import io
import json
import uuid
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ..comfy.server import Server
from .browser import open_workflow, opened, wait_until_ready

pytestmark = [pytest.mark.comfy, pytest.mark.page]

HOSTILE = "<img src=x onerror=document.title='owned'>"
_pixel = io.BytesIO()
Image.new("RGB", (1, 1)).save(_pixel, "png")
DOT = f"data:image/png;base64,{base64.b64encode(_pixel.getvalue()).decode()}"
METADATA = {
    "ember": {
        "modelspec.trigger_phrase": "ember style, burning",
        "ss_base_model_version": "flux1",
        "modelspec.thumbnail": DOT,
    },
    "heart": {"modelspec.trigger_phrase": HOSTILE, "ss_base_model_version": HOSTILE},
    "moon": {},
}


@pytest.fixture(scope="module")
def page(comfy: Server) -> Iterator[Any]:
    for name, metadata in METADATA.items():
        save_file({"a": torch.zeros(1)}, comfy.loras / f"widget_{name}.safetensors", metadata)
    with opened(comfy, (1400, 1000)) as tab:
        yield tab


@pytest.fixture(params=["canvas", "vue"])
def renderer(page: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    setting(page, "Comfy.VueNodes.Enabled", request.param == "vue")
    yield request.param
    setting(page, "Comfy.VueNodes.Enabled", False)


def setting(page: Any, name: str, value: Any) -> None:
    page.evaluate("([name, value]) => app.extensionManager.setting.set(name, value)", [name, value])
    page.wait_for_timeout(100)


@pytest.fixture
def board(page: Any) -> Any:
    """The page with a LoRA List connected to a MoLE Mix, at zoom 1."""
    # with a new id, because the page identifies widgets by the ids of graph and node
    open_workflow(page, {"id": str(uuid.uuid4()), "nodes": [], "links": [], "version": 0.4})
    page.evaluate(
        """() => {
            const list = LiteGraph.createNode('LegoMoLE_LoRAList');
            const mix = LiteGraph.createNode('LegoMoLE_MoLEMix');
            for (const [node, x] of [[list, 80], [mix, 500]]) { app.graph.add(node); node.pos = [x, 120]; }
            list.connect(0, mix, mix.inputs.findIndex(input => input.name === 'loras.lora0'));
            app.canvas.ds.scale = 1;
            app.canvas.ds.offset = [0, 0];
            app.canvas.setDirty(true, true);
        }"""
    )
    page.wait_for_timeout(300)
    return page


def add(page: Any, *words: str) -> None:
    """Search for files and add the first result of each search, by keyboard."""
    page.locator(".lm input[type=search]").click()
    page.wait_for_selector(".lm-found li")
    for word in words:
        page.keyboard.type(f"widget {word}")
        page.wait_for_function("() => document.querySelectorAll('.lm-found li').length === 1")
        page.keyboard.press("Enter")
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)  # the nodes change their size


def value(page: Any, kind: str = "LegoMoLE_LoRAList", widget: str = "loras") -> Any:
    """Return the value of a widget that the page would send to the server."""
    sent = page.evaluate("async () => (await app.graphToPrompt()).output")
    return next(node["inputs"][widget] for node in sent.values() if node["class_type"] == kind)


def rows(page: Any) -> list[tuple[str, bool, float]]:
    """Return name, switch and strength of each row of the list."""
    entries = [(e["name"], e["on"], e["strength"]) for e in json.loads(value(page))]
    return [(name.removeprefix("widget_").removesuffix(".safetensors"), on, strength) for name, on, strength in entries]


def names(page: Any) -> str:
    return " ".join(name for name, *_ in rows(page))


def drag(page: Any, start: int, end: int) -> None:
    """Drag a row by its dots to the upper half of another row."""
    grip = page.locator(".lm-grip").nth(start).bounding_box()
    goal = page.locator(".lm-row").nth(end).bounding_box()
    page.mouse.move(grip["x"] + grip["width"] / 2, grip["y"] + grip["height"] / 2)
    page.mouse.down()
    page.mouse.move(goal["x"] + 20, goal["y"] + goal["height"] / 2, steps=5)
    page.mouse.move(goal["x"] + 20, goal["y"] + 3)
    page.mouse.up()


def test_list_by_keyboard(board: Any, renderer: str) -> None:
    add(board, "ember", "heart", "moon")
    assert rows(board) == [("ember", True, 1), ("heart", True, 1), ("moon", True, 1)]
    board.locator(".lm-row input[type=range]").first.focus()
    board.keyboard.press("ArrowLeft")
    board.keyboard.press("ArrowLeft")
    board.locator(".lm-row input[type=checkbox]").nth(1).focus()
    board.keyboard.press("Space")
    board.locator(".lm-row input[type=number]").nth(2).focus()
    board.keyboard.press("Control+a")
    board.keyboard.type("-3.25")
    board.keyboard.press("Tab")
    assert rows(board) == [("ember", True, 0.9), ("heart", False, 1), ("moon", True, -3.25)]
    board.locator(".lm-grip").nth(2).focus()
    board.keyboard.press("ArrowUp")
    board.keyboard.press("ArrowUp")  # the focus has moved with the row
    board.keyboard.press("ArrowUp")  # no effect at the top
    assert names(board) == "moon ember heart"
    board.locator(".lm-remove").nth(1).focus()
    board.keyboard.press("Enter")
    board.keyboard.press("Delete")  # must not delete the node
    assert names(board) == "moon heart"


@pytest.mark.parametrize(("renderer", "zoom"), [("canvas", 1.5), ("vue", 0.8)], indirect=["renderer"])
def test_list_by_mouse_at_every_zoom(board: Any, renderer: str, zoom: float) -> None:
    add(board, "ember", "heart", "moon")
    board.evaluate("zoom => { app.canvas.ds.scale = zoom; app.canvas.setDirty(true, true); }", zoom)
    board.wait_for_timeout(300)
    position = board.evaluate("() => [...app.graph.nodes.find(n => n.type === 'LegoMoLE_LoRAList').pos]")
    drag(board, 2, 0)
    assert names(board) == "moon ember heart"
    board.locator(".lm-row input[type=checkbox]").first.click()
    slider = board.locator(".lm-row input[type=range]").nth(1)
    box = slider.bounding_box()
    slider.click(position={"x": box["width"] - 1, "y": box["height"] / 2})
    board.locator(".lm-remove").nth(2).click()
    assert rows(board) == [("moon", False, 1), ("ember", True, 2)]
    assert board.evaluate("() => [...app.graph.nodes.find(n => n.type === 'LegoMoLE_LoRAList').pos]") == position


def test_list_shows_metadata_as_text_not_as_markup(board: Any, renderer: str) -> None:
    add(board, "ember", "heart")
    board.wait_for_selector(".lm-row img")
    shown = board.evaluate(
        """() => [...document.querySelectorAll('.lm-row')].map(row => [
            row.querySelector('.lm-badge').textContent, row.querySelector('.lm-words').textContent,
            [...row.querySelectorAll('img')].map(image => image.getAttribute('src'))])"""
    )
    assert shown == [["flux1", "ember style, burning", [DOT]], [HOSTILE, HOSTILE, []]]
    assert board.title() != "owned"


def test_list_marks_missing_files(board: Any, renderer: str) -> None:
    board.evaluate(
        """() => { app.graph.nodes.find(n => n.type === 'LegoMoLE_LoRAList').widgets[0].value =
            JSON.stringify([{name: 'gone.safetensors', on: true, strength: 1}]); }"""
    )
    board.wait_for_selector(".lm-missing")
    assert board.locator(".lm-missing .lm-words").text_content() == "There is no such LoRA."


def test_undo_and_redo(board: Any, renderer: str) -> None:
    """Each change by the user is one step for undo. A node that changes its size later would add a step."""
    add(board, "ember", "heart", "moon")
    board.wait_for_function("() => document.querySelectorAll('.lm-chip').length === 3")
    steps = ["", "ember", "ember heart", "ember heart moon", "moon ember heart", "moon ember"]
    drag(board, 2, 0)
    board.locator(".lm-remove").nth(2).click()
    assert names(board) == steps[-1]
    for key, wanted in [*(("z", step) for step in steps[-2::-1]), *(("y", step) for step in steps[1:])]:
        board.keyboard.press("Control")  # when the key is released, the page looks for changes
        board.keyboard.press(f"Control+{key}")
        board.wait_for_function(
            """wanted => wanted === [...document.querySelectorAll('.lm-row .lm-name')]
                .map(name => name.textContent.replace('widget_', '')).join(' ')""",
            arg=wanted,
        )
        board.wait_for_timeout(700)  # longer than the interval in which the switches are refreshed
    assert names(board) == steps[-1]
    board.locator(".lm-row input[type=checkbox]").first.click()  # the list that is shown belongs to the current node
    assert rows(board) == [("moon", False, 1), ("ember", True, 1)]


def test_values_survive_saving_copying_and_subgraphs(board: Any, renderer: str) -> None:
    add(board, "ember", "moon")
    board.locator(".lm-row input[type=checkbox]").first.click()
    board.locator(".lm-chip").first.click()
    wanted = [("ember", False, 1), ("moon", True, 1)]
    switched = lambda: value(board, "LegoMoLE_MoLEMix", "switched_off")  # noqa: E731
    assert (rows(board), switched()) == (wanted, "1")
    saved = board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    board.evaluate("() => app.graph.clear()")
    open_workflow(board, saved)
    assert (rows(board), switched()) == (wanted, "1")
    both = board.evaluate(
        """() => { const list = app.graph.nodes.find(n => n.type === 'LegoMoLE_LoRAList');
            app.canvas.copyToClipboard([list]); app.canvas.pasteFromClipboard();
            return app.graph.nodes.filter(n => n.type === 'LegoMoLE_LoRAList').map(n => n.widgets[0].value); }"""
    )
    assert len(both) == 2
    assert both[0] == both[1]
    open_workflow(board, saved)
    board.evaluate("() => { app.canvas.graph.convertToSubgraph(new Set(app.graph.nodes)); }")
    board.wait_for_timeout(300)
    assert (rows(board), switched()) == (wanted, "1")
    open_workflow(board, board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))
    assert (rows(board), switched()) == (wanted, "1")


def test_strip_switches_loras_of_the_mix(board: Any, renderer: str) -> None:
    switched = lambda: value(board, "LegoMoLE_MoLEMix", "switched_off")  # noqa: E731
    assert board.locator(".lm-chip").count() == 0
    add(board, "ember", "heart", "moon")
    board.wait_for_function("() => document.querySelectorAll('.lm-chip').length === 3")
    chips = board.locator(".lm-chip")
    assert chips.all_text_contents() == ["1 widget_ember", "2 widget_heart", "3 widget_moon"]
    chips.nth(2).click()
    board.locator(".lm-chip").first.focus()
    board.keyboard.press("Enter")
    assert switched() == "1, 3"
    board.evaluate(  # typed by name
        """() => { app.graph.nodes.find(n => n.type === 'LegoMoLE_MoLEMix').widgets
            .find(w => w.name === 'switched_off').value = 'widget_heart'; }"""
    )
    board.wait_for_selector(".lm-chip:nth-child(2)[aria-pressed=false]")
    pressed = [chips.nth(i).get_attribute("aria-pressed") for i in range(3)]
    assert pressed == ["true", "false", "true"]


def test_light_theme_is_readable(board: Any, renderer: str) -> None:
    """The contrast of text and background is at least 4.5 in both themes (WCAG 2, AA)."""
    add(board, "ember")
    board.wait_for_function("() => document.querySelector('.lm-words').textContent")
    for theme in ("light", "dark"):
        setting(board, "Comfy.ColorPalette", theme)
        board.wait_for_timeout(300)
        contrasts = board.evaluate(
            """() => ['.lm-name', '.lm-words', '.lm-badge'].map(name => {
                const item = document.querySelector(name);
                const rgb = color => { const pen = document.createElement('canvas').getContext('2d');
                    pen.fillStyle = color; pen.fillRect(0, 0, 1, 1); return [...pen.getImageData(0, 0, 1, 1).data]; };
                const linear = x => x <= .04045 ? x / 12.92 : ((x + .055) / 1.055) ** 2.4;
                const light = c => c.slice(0, 3).map(x => linear(x / 255)).reduce(
                    (sum, x, i) => sum + x * [.2126, .7152, .0722][i], 0);
                const ink = light(rgb(getComputedStyle(item).color));
                const paper = light(rgb(getComputedStyle(item.closest('.lm-row')).backgroundColor));
                return (Math.max(ink, paper) + .05) / (Math.min(ink, paper) + .05); })"""
        )
        assert min(contrasts) > 4.5, (theme, contrasts)


def test_failing_node_shows_our_error(board: Any, renderer: str) -> None:
    """The page names the node and shows the error with its remedy, without a traceback."""
    board.evaluate(
        """() => {
            const list = app.graph.nodes.find(n => n.type === 'LegoMoLE_LoRAList');
            list.widgets[0].value = JSON.stringify([{name: 'gone.safetensors', on: true, strength: 1}]);
            app.graph.remove(app.graph.nodes.find(n => n.type === 'LegoMoLE_MoLEMix'));
            const show = LiteGraph.createNode('PreviewAny');
            app.graph.add(show);
            show.pos = [500, 120];
            list.connect(1, show, 0);
        }"""
    )
    board.evaluate("() => app.queuePrompt(0, 1)")
    board.get_by_text("LoRA List failed").wait_for()
    board.get_by_role("button", name="View details").click()
    details = board.get_by_text("refresh the page, or choose another file").first
    details.wait_for()
    assert "There is no such LoRA.\n  file:     gone.safetensors\n  expected: a file in" in details.text_content()
    board.keyboard.press("Escape")


def test_chinese(board: Any) -> None:
    setting(board, "Comfy.Locale", "zh")
    try:
        board.reload()
        wait_until_ready(board)
        board.evaluate("() => { app.graph.clear(); app.graph.add(LiteGraph.createNode('LegoMoLE_LoRAList')); }")
        board.wait_for_selector(".lm input[type=search]")
        assert board.locator(".lm input[type=search]").get_attribute("placeholder") == "添加 LoRA：按名称搜索"
    finally:
        setting(board, "Comfy.Locale", "en")
