"""LoRA List in the real page, used by mouse and keyboard, in both renderers."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest

from .browser import open_workflow, sent, setting, settle, wait_until_ready
from .conftest import HOSTILE

pytestmark = [pytest.mark.comfy, pytest.mark.page]

LIST, MIX = "LegoMoLE_LoRAList", "LegoMoLE_MoLEMix"
CHECKBOX, NUMBER = ".lm-row input[type=checkbox]:visible", ".lm-row input[type=number]:visible"


def add(page: Any, *words: str) -> None:
    """Search for files and add the first result of each search, by keyboard."""
    open_search(page)
    for word in words:
        add_found(page, word)
    page.keyboard.press("Escape")
    settle(page)  # the nodes change their size


def open_search(page: Any) -> None:
    page.locator(".lm input[type=search]").click()
    page.wait_for_selector(".lm-found li")


def add_found(page: Any, word: str) -> None:
    page.keyboard.type(f"widget {word}")
    page.wait_for_function("() => document.querySelectorAll('.lm-found li').length === 1")
    page.keyboard.press("Enter")


def rows(page: Any) -> list[tuple[str, bool, float]]:
    """Return name, switch and strength of each row of the list."""
    entries = [(e["name"], e["on"], e["strength"]) for e in json.loads(sent(page, LIST)["loras"])]
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


def list_node(page: Any, expression: str) -> Any:
    """Evaluate an expression about the LoRA List ``list``."""
    return page.evaluate(
        f"() => {{ const list = app.graph.nodes.find(n => n.type === '{LIST}'); return {expression}; }}"
    )


def test_list_by_keyboard(board: Any, renderer: str) -> None:
    add(board, "ember", "heart", "moon")
    assert rows(board) == [("ember", True, 1), ("heart", True, 1), ("moon", True, 1)]
    board.locator(NUMBER).first.focus()
    board.keyboard.press("ArrowDown")
    board.keyboard.press("ArrowDown")
    board.locator(CHECKBOX).nth(1).focus()
    board.keyboard.press("Space")
    board.locator(NUMBER).nth(2).focus()
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
    settle(board)
    position = list_node(board, "[...list.pos]")
    drag(board, 2, 0)
    assert names(board) == "moon ember heart"
    board.locator(CHECKBOX).first.click()
    box = board.locator(NUMBER).nth(1).bounding_box()
    board.mouse.move(box["x"] + 10, box["y"] + box["height"] / 2)
    board.mouse.down()
    board.mouse.move(box["x"] + 60, box["y"] + box["height"] / 2, steps=3)  # 0.01 per pixel
    board.mouse.up()
    board.locator(".lm-remove").nth(2).click()
    assert rows(board) == [("moon", False, 1), ("ember", True, 1.5)]
    assert list_node(board, "[...list.pos]") == position


def test_ten_rows_of_one_line_fit(board: Any, renderer: str) -> None:
    """At 28 pixels each, inside of the node."""
    entries = [{"name": f"widget_{name}.safetensors"} for name in ["ember", "heart"] * 5]
    list_node(board, f"list.widgets[0].value = JSON.stringify({json.dumps(entries)})")
    settle(board)
    boxes = [board.locator(".lm-row").nth(i).bounding_box() for i in range(10)]
    assert {round(below["y"] - above["y"]) for above, below in pairwise(boxes)} == {28}
    scroller = board.locator(".lm-scroll").bounding_box()
    assert boxes[-1]["y"] + boxes[-1]["height"] <= scroller["y"] + scroller["height"] + 1
    bottom = list_node(board, "list.pos[1] + list.size[1] + app.canvas.canvas.getBoundingClientRect().y")
    assert scroller["y"] + scroller["height"] <= bottom


def test_file_of_a_missing_row_is_changed_in_place(board: Any, renderer: str) -> None:
    """A click on the name opens the search; the row keeps its place, switch and strength."""
    missing = [
        {"name": "styles\\gone.safetensors", "on": False, "strength": 0.7, "clip": 0.2},
        {"name": "widget_moon.safetensors"},
    ]
    list_node(board, f"list.widgets[0].value = JSON.stringify({json.dumps(missing)})")
    board.wait_for_selector(".lm-missing")
    assert board.locator(".lm-missing .lm-name").text_content() == "gone: There is no such LoRA."
    board.locator(".lm-missing .lm-name").click()
    board.wait_for_selector(".lm-found li")
    board.keyboard.press("Escape")  # changes nothing, and the next choice adds a row
    board.locator(".lm-missing .lm-name").click()
    board.wait_for_selector(".lm-found li")
    board.keyboard.type("widget heart")
    board.wait_for_function("() => document.querySelectorAll('.lm-found li').length === 1")
    board.keyboard.press("Enter")
    assert rows(board) == [("heart", False, 0.7), ("moon", True, 1)]
    assert json.loads(sent(board, LIST)["loras"])[0]["clip"] == 0.2
    assert board.locator(".lm-missing").count() == 0
    add(board, "ember")
    assert names(board) == "heart moon ember"


def test_all_rows_are_switched_together(board: Any, renderer: str) -> None:
    add(board, "ember", "heart")
    board.locator(CHECKBOX).first.click()
    everything = board.locator(".lm-head input[type=checkbox]")
    assert everything.evaluate("box => box.indeterminate")
    everything.click()
    assert rows(board) == [("ember", True, 1), ("heart", True, 1)]
    everything.click()
    assert rows(board) == [("ember", False, 1), ("heart", False, 1)]
    assert board.locator(".lm-off").count() == 2


def test_separate_strength_on_text_encoders(board: Any, renderer: str) -> None:
    add(board, "ember")
    assert board.locator(".lm-row .lm-clip").count() == 0
    board.locator(".lm-head .lm-clip").click()
    clip = board.locator(".lm-row .lm-clip")
    clip.fill("0.3")
    clip.press("Tab")
    add(board, "heart")
    clips = lambda: [entry.get("clip") for entry in json.loads(sent(board, LIST)["loras"])]  # noqa: E731
    assert (rows(board), clips()) == ([("ember", True, 1), ("heart", True, 1)], [0.3, 1])
    board.locator(".lm-head .lm-clip").click()
    assert clips() == [None, None]


def test_tags_of_a_prompt_become_rows(board: Any, renderer: str) -> None:
    """With strengths, for files in any folder; unknown ones as rows to change."""
    tags = "a <lora:widget_ember:0.8>, b <lora:Widget_Moon> <lora:styles/gone:-1.5:0.25>"
    search = board.locator(".lm input[type=search]")
    search.click()
    board.evaluate(
        """text => { const transfer = new DataTransfer(); transfer.setData('text/plain', text);
            document.execCommand('insertText', false, text); }""",
        tags,
    )
    board.wait_for_selector(".lm-missing")
    assert rows(board) == [("ember", True, 0.8), ("moon", True, 1), ("styles/gone", True, -1.5)]
    assert [entry.get("clip") for entry in json.loads(sent(board, LIST)["loras"])] == [None, None, 0.25]
    assert search.input_value() == ""


def test_menu_of_a_row(board: Any, renderer: str) -> None:
    """The node's menu, by the right button, has entries for the row; elsewhere on the list it has none."""
    add(board, "ember", "heart")
    board.locator(".lm-row").nth(1).click(button="right")
    board.get_by_text("Move widget_heart up").click()
    assert names(board) == "heart ember"
    board.locator(".lm-row").nth(0).click(button="right")
    board.get_by_text("Switch widget_heart off").click()
    assert rows(board) == [("heart", False, 1), ("ember", True, 1)]
    board.locator(".lm-row").nth(0).click(button="right")
    board.get_by_text("Change the file of widget_heart", exact=True).click()
    board.wait_for_selector(".lm-found li")
    board.keyboard.press("Escape")


def test_wheel_zooms_and_middle_button_pans_over_the_list(board: Any, renderer: str) -> None:
    add(board, "ember")
    board.evaluate("() => document.activeElement.blur()")
    view = lambda: board.evaluate("() => [app.canvas.ds.scale, ...app.canvas.ds.offset]")  # noqa: E731
    box = board.locator(".lm-row").first.bounding_box()
    board.mouse.move(box["x"] + 120, box["y"] + 10)
    board.mouse.wheel(0, -120)
    board.wait_for_function("() => app.canvas.ds.scale > 1.01")
    scale, x, y = view()
    board.mouse.down(button="middle")
    board.mouse.move(box["x"] + 160, box["y"] + 40, steps=4)
    board.mouse.up(button="middle")
    settle(board)
    assert view() == pytest.approx([scale, x + 40 / scale, y + 30 / scale], abs=1.5)
    board.mouse.move(box["x"] + 200, box["y"] + 80)
    settle(board)
    assert view() == pytest.approx([scale, x + 40 / scale, y + 30 / scale], abs=1.5)
    assert rows(board) == [("ember", True, 1)]


def test_wheel_over_a_number_does_not_change_it(board: Any, renderer: str) -> None:
    add(board, "ember")
    board.locator(NUMBER).first.focus()
    board.locator(NUMBER).first.hover()
    board.mouse.wheel(0, 120)
    board.wait_for_function("() => app.canvas.ds.scale < 0.99")
    assert rows(board) == [("ember", True, 1)]


def test_metadata_is_shown_as_text_not_as_markup(board: Any, renderer: str) -> None:
    add(board, "ember", "heart", "moon")
    board.wait_for_function("() => document.querySelectorAll('.lm-row .lm-badge')[2].textContent")
    shown = board.evaluate(
        """() => [...document.querySelectorAll('.lm-row')].map(row => [
            row.querySelector('.lm-badge').textContent, row.querySelector('.lm-name').title.split('\\n')[1]])"""
    )
    assert shown == [["flux1", "ember style, burning"], [HOSTILE, HOSTILE], ["Pony", "moon, night"]]
    assert board.title() != "owned"


def convert(page: Any, *kinds: str) -> None:
    """Put nodes into a new subgraph, ``window.made``."""
    page.evaluate(
        """kinds => { const nodes = app.graph.nodes.filter(node => kinds.includes(node.type));
            window.made = app.graph.convertToSubgraph(new Set(nodes)).node; }""",
        list(kinds),
    )
    settle(page)


def test_list_keeps_its_link_in_a_subgraph(board: Any, renderer: str) -> None:
    add(board, "ember")
    convert(board, LIST)
    (origin, slot) = sent(board, MIX)["loras.lora0"]
    assert (origin.count(":"), slot) == (1, 0)
    assert board.locator(".lm-chip").all_text_contents() == ["1 widget_ember"]
    board.evaluate("() => app.graph.nodes.find(n => n.type === 'LegoMoLE_MoLEMix').disconnectInput(1)")
    settle(board)
    assert "loras.lora0" not in sent(board, MIX)


def test_promoted_list(board: Any, renderer: str) -> None:
    """On the subgraph's node it is drawn, edits the value that is sent, and survives saving and undo."""
    add(board, "ember", "heart")
    convert(board, LIST, MIX)
    board.evaluate(
        """() => { const list = made.subgraph.nodes.find(n => n.type === 'LegoMoLE_LoRAList');
            const slot = list.inputs.find(input => input.name === 'loras');
            made.subgraph.addInput('loras', slot.type).connect(slot, list);
            made.pos = [200, 200]; made.setSize(made.computeSize()); app.canvas.setDirty(true, true); }"""
    )
    board.wait_for_selector(".lm-row >> visible=true")
    assert board.locator(".lm-row:visible").count() == 2
    row, node = (
        board.locator(".lm-row:visible").nth(1).bounding_box(),
        board.evaluate("() => [...made.pos, ...made.size]"),
    )
    top = board.evaluate("() => app.canvas.canvas.getBoundingClientRect().y")
    assert node[1] < row["y"] - top < row["y"] - top + row["height"] < node[1] + node[3]
    board.locator(CHECKBOX).first.click()
    wanted = [("ember", False, 1), ("heart", True, 1)]
    assert rows(board) == wanted
    saved = board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    board.keyboard.press("Control")
    board.keyboard.press("Control+z")
    board.wait_for_function("() => document.querySelectorAll('.lm-off').length === 0")
    assert rows(board) == [("ember", True, 1), ("heart", True, 1)]
    open_workflow(board, saved)
    board.wait_for_selector(".lm-row >> visible=true")
    assert rows(board) == wanted
    board.locator(CHECKBOX).first.click()
    assert rows(board) == [("ember", True, 1), ("heart", True, 1)]


def test_undo_and_redo(board: Any, renderer: str) -> None:
    """Each change by the user is one step for undo. A node that changes its size later would add a step."""
    steps = ["", "ember", "ember heart", "ember heart moon", "moon ember heart", "moon ember"]
    queue = "app.extensionManager.workflow.activeWorkflow.changeTracker.undoQueue.length"
    open_search(board)
    board.keyboard.press("Control")  # when the key is released, the page looks for changes
    settle(board)
    before = board.evaluate(queue)
    changes: list[Callable[[], None]] = [
        lambda: add_found(board, "ember"), lambda: add_found(board, "heart"), lambda: add_found(board, "moon"),
        lambda: drag(board, 2, 0), lambda: board.locator(".lm-remove").nth(2).click(),
    ]  # fmt: skip
    for i, change in enumerate(changes):
        change()
        if i == 2:
            board.keyboard.press("Escape")
        board.wait_for_function(
            "n => document.querySelectorAll('.lm-chip').length === n", arg=len(steps[i + 1].split())
        )
        settle(board)
        board.keyboard.press("Control")
        board.wait_for_function(f"n => {queue} >= n", arg=before + i + 1)  # a slow page makes one step of two changes
    assert board.evaluate(queue) == before + 5
    assert names(board) == steps[-1]
    for key, wanted in [*(("z", step) for step in steps[-2::-1]), *(("y", step) for step in steps[1:])]:
        board.keyboard.press("Control")
        board.keyboard.press(f"Control+{key}")
        board.wait_for_function(
            """wanted => wanted === [...document.querySelectorAll('.lm-row .lm-name')]
                .map(name => name.textContent.replace('widget_', '')).join(' ')""",
            arg=wanted,
        )
        board.wait_for_function(
            "count => document.querySelectorAll('.lm-chip').length === count", arg=len(wanted.split())
        )
        wait_until_ready(board)  # a change that is looked for while the graph is loaded is another step
        settle(board)
    assert names(board) == steps[-1]
    board.locator(".lm-row input[type=checkbox]").first.click()  # the list that is shown belongs to the current node
    assert rows(board) == [("moon", False, 1), ("ember", True, 1)]


def test_values_survive_saving_copying_and_subgraphs(board: Any, renderer: str) -> None:
    add(board, "ember", "moon")
    board.locator(".lm-row input[type=checkbox]").first.click()
    board.locator(".lm-chip").first.click()
    wanted = [("ember", False, 1), ("moon", True, 1)]
    switched = lambda: sent(board, MIX)["switched_off"]  # noqa: E731
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
    settle(board)
    assert (rows(board), switched()) == (wanted, "1")
    open_workflow(board, board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))"))
    assert (rows(board), switched()) == (wanted, "1")


def test_light_theme_is_readable(board: Any, renderer: str) -> None:
    """The contrast of text and background is at least 4.5 in both themes (WCAG 2, AA)."""
    add(board, "ember")
    board.wait_for_function("() => document.querySelector('.lm-row .lm-badge').textContent")
    for theme in ("light", "dark"):
        setting(board, "Comfy.ColorPalette", theme)
        contrasts = board.evaluate(
            """() => ['.lm-row .lm-name', '.lm-row .lm-badge'].map(name => {
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
        board.reload()  # what the page still draws anew for the language would disturb the next test
        wait_until_ready(board)
