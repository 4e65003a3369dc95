"""Start and end steps of LoRA List, and the region sockets of MoLE Mix, in the real page, in both renderers."""

from __future__ import annotations

import json
from typing import Any

import pytest

from .browser import open_workflow, sent, settle
from .test_lora_list import LIST, MIX, add, convert, list_node
from .test_mask_strip import fill, wait_for_chips

pytestmark = [pytest.mark.comfy, pytest.mark.page]


def entries(page: Any) -> list[dict[str, Any]]:
    return json.loads(sent(page, LIST)["loras"])


def steps(page: Any) -> list[tuple[float | None, float | None]]:
    """Start and end of each row, as they are kept."""
    return [(entry.get("start"), entry.get("end")) for entry in entries(page)]


def badges(page: Any) -> list[str]:
    return page.locator(".lm-steps:visible").all_text_contents()


def set_steps(page: Any, number: int, start: str, end: str) -> None:
    """Type start and end in the dialog of a row."""
    page.locator(".lm-info:visible").nth(number).click()
    for name, value in (("start", start), ("end", end)):
        field = page.locator(f".lm-dialog .lm-{name}")
        field.fill(value)
        field.press("Tab")
    page.keyboard.press("Escape")
    page.wait_for_selector(".lm-dialog", state="detached")


# ---- steps


def test_steps_of_a_row_are_written_in_its_dialog(board: Any, renderer: str) -> None:
    add(board, "ember", "heart")
    assert badges(board) == []
    set_steps(board, 0, "12.5", "40")
    assert entries(board)[0]["start"] == 0.125
    assert steps(board) == [(0.125, 0.4), (None, None)]
    assert badges(board) == ["12.5–40%"]
    assert "12.5 to 40%" in board.locator(".lm-steps").get_attribute("title")
    set_steps(board, 1, "60", "30")  # the end stays after the start
    assert steps(board)[1] == (0.6, 0.61)
    set_steps(board, 0, "-5", "250")
    set_steps(board, 1, "", "100")  # nothing typed changes nothing
    assert steps(board) == [(None, None), (0.6, None)]
    assert badges(board) == ["60–100%"]


def test_steps_survive_moving_saving_copying_undo_and_subgraphs(board: Any, renderer: str) -> None:
    add(board, "ember", "heart")
    set_steps(board, 1, "0", "40")
    board.locator(".lm-grip").nth(1).focus()
    board.keyboard.press("ArrowUp")
    wanted = [(None, 0.4), (None, None)]
    assert steps(board) == wanted
    board.locator(".lm-name").first.click()  # another file
    board.wait_for_selector(".lm-found li")
    board.keyboard.type("widget moon")
    board.wait_for_function("() => document.querySelectorAll('.lm-found li').length === 1")
    board.keyboard.press("Enter")
    assert (steps(board), entries(board)[0]["name"]) == (wanted, "widget_moon.safetensors")
    saved = board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    board.evaluate("() => app.graph.clear()")
    open_workflow(board, saved)
    assert (steps(board), badges(board)) == (wanted, ["0–40%"])
    values = board.evaluate(
        f"""() => {{ const list = app.graph.nodes.find(n => n.type === '{LIST}');
            app.canvas.copyToClipboard([list]); app.canvas.pasteFromClipboard();
            return app.graph.nodes.filter(n => n.type === '{LIST}').map(n => n.widgets[0].value); }}"""
    )
    assert len(values) == 2
    assert values[0] == values[1]
    open_workflow(board, saved)
    set_steps(board, 1, "50", "100")
    assert steps(board) == [(None, 0.4), (0.5, None)]
    board.keyboard.press("Control")
    board.keyboard.press("Control+z")  # an input's change is one step, of which start was the only one
    board.wait_for_function("() => document.querySelectorAll('.lm-steps').length === 1")
    assert steps(board) == wanted
    convert(board, LIST)
    assert steps(board) == wanted


def test_steps_of_a_list_shown_on_a_subgraph(board: Any, renderer: str) -> None:
    add(board, "ember", "heart")
    convert(board, LIST, MIX)
    board.evaluate(
        f"""() => {{ const list = made.subgraph.nodes.find(n => n.type === '{LIST}');
            const slot = list.inputs.find(input => input.name === 'loras');
            made.subgraph.addInput('loras', slot.type).connect(slot, list);
            made.pos = [200, 200]; made.setSize(made.computeSize()); app.canvas.setDirty(true, true); }}"""
    )
    board.wait_for_selector(".lm-row >> visible=true")
    set_steps(board, 1, "20", "100")
    assert (steps(board), badges(board)) == ([(None, None), (0.2, None)], ["20–100%"])


def test_wrong_steps_of_a_file_are_left_out(board: Any) -> None:
    """The page keeps what the server would accept: shares."""
    odd = [
        {"name": "widget_ember.safetensors", "start": "x", "end": 7},
        {"name": "widget_moon.safetensors", "start": 0.25},
    ]
    list_node(board, f"list.widgets[0].value = JSON.stringify({json.dumps(odd)})")
    settle(board)
    assert steps(board) == [(None, None), (0.25, None)]


# ---- regions


def connect(page: Any, number: int) -> None:
    """Connect a new Region to the region of the LoRA of this number."""
    page.evaluate(
        f"""number => {{ const region = LiteGraph.createNode('LegoMoLE_Region');
            app.graph.add(region);
            region.pos = [80, 400 + 300 * number];
            const mix = app.graph.nodes.find(n => n.type === '{MIX}');
            region.connect(0, mix, mix.inputs.findIndex(input => input.name === `regions.region${{number}}`)); }}""",
        number,
    )
    settle(page)


def disconnect(page: Any, number: int) -> None:
    page.evaluate(
        f"""number => {{ const mix = app.graph.nodes.find(n => n.type === '{MIX}');
            mix.disconnectInput(mix.inputs.findIndex(input => input.name === `regions.region${{number}}`)); }}""",
        number,
    )
    settle(page)


def regions(page: Any) -> list[str]:
    """The regions that a prompt would have."""
    return sorted(name for name in sent(page, MIX) if name.startswith("regions."))


def sockets(page: Any) -> list[str]:
    return page.evaluate(
        f"""() => app.graph.nodes.find(n => n.type === '{MIX}').inputs.map(({{ name }}) => name)
            .filter(name => name.startsWith('regions.'))"""
    )


def fill_and_connect(page: Any, *names: str) -> None:
    """Give the list rows as the user does, so that the mix is told of them."""
    fill(page, *names)
    list_node(page, "list.widgets[0].element.querySelector('.lm-clip').click()")
    settle(page)


def test_every_lora_has_a_region_which_stays_its_own(board: Any, renderer: str) -> None:
    """Also when a LoRA before it has none, and when one is disconnected."""
    assert sockets(board) == ["regions.region1"]
    fill_and_connect(board, "widget_ember", "widget_heart", "widget_moon")
    assert sockets(board) == [f"regions.region{number}" for number in (1, 2, 3)]
    connect(board, 3)
    connect(board, 1)
    assert regions(board) == ["regions.region1", "regions.region3"]
    wait_for_chips(board, "1 ember ▣", "2 heart", "3 moon ▣")
    assert "region3" in board.locator(".lm-chip").nth(2).get_attribute("title")
    disconnect(board, 1)
    assert regions(board) == ["regions.region3"]
    wait_for_chips(board, "1 ember", "2 heart", "3 moon ▣")
    saved = board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    before = sockets(board)
    open_workflow(board, saved)
    assert (regions(board), sockets(board)) == (["regions.region3"], before)
    wait_for_chips(board, "1 ember", "2 heart", "3 moon ▣")
    again = board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    assert [node["size"] for node in again["nodes"]] == [node["size"] for node in saved["nodes"]]
    convert(board, "LegoMoLE_Region")
    assert regions(board) == ["regions.region3"]


def test_named_regions_are_marked_on_the_switches(board: Any, renderer: str) -> None:
    """All Region nodes of a chain count, in any order of the LoRAs, and the regions are sent to the server."""
    fill_and_connect(board, "widget_ember", "widget_heart", "widget_moon")
    board.evaluate(
        f"""() => {{ const [first, second] = ['moon', 'ember'].map((name, i) => {{
                const region = LiteGraph.createNode('LegoMoLE_Region'); app.graph.add(region);
                region.pos = [80, 400 + 520 * i];
                region.widgets.find(({{ name }}) => name === 'lora').value = `widget_${{name}}.safetensors`;
                return region; }});
            const mix = app.graph.nodes.find(n => n.type === '{MIX}');
            const slot = (node, name) => node.inputs.findIndex(input => input.name === name);
            first.connect(1, second, slot(second, 'regions'));
            second.connect(1, mix, slot(mix, 'named_regions')); }}"""
    )
    settle(board)
    wait_for_chips(board, "1 ember ▣", "2 heart", "3 moon ▣")
    assert board.locator(".lm-chip").first.get_attribute("title") == "widget_ember\nacts in the region that names it"
    assert regions(board) == []
    assert "named_regions" in sent(board, MIX)
    saved = board.evaluate("() => JSON.parse(JSON.stringify(app.graph.serialize()))")
    open_workflow(board, saved)
    wait_for_chips(board, "1 ember ▣", "2 heart", "3 moon ▣")
    fill(board, "widget_moon", "widget_heart")
    wait_for_chips(board, "1 moon ▣", "2 heart")


def test_regions_fit_on_the_node(board: Any, renderer: str) -> None:
    """The widgets below the sockets are inside of the node when sockets were added."""
    fill_and_connect(board, *(f"widget_{name}" for name in ("ember", "heart", "moon", "ember", "heart")))
    assert len(sockets(board)) == 5
    mix = f"app.graph.nodes.find(n => n.type === '{MIX}')"
    needed, size = board.evaluate(f"() => [{mix}.computeSize()[1], {mix}.size[1]]")
    assert size >= needed
