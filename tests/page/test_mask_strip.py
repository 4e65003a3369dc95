"""The switches of MoLE Mix in the real page, in both renderers."""

from __future__ import annotations

from typing import Any

import pytest

from .browser import sent, settle

pytestmark = [pytest.mark.comfy, pytest.mark.page]

MIX = "LegoMoLE_MoLEMix"


def fill(page: Any, *names: str) -> None:
    """Give the LoRA List rows."""
    page.evaluate(
        """names => { app.graph.nodes.find(n => n.type === 'LegoMoLE_LoRAList').widgets[0].value =
            JSON.stringify(names.map(name => ({ name: `${name}.safetensors` }))); }""",
        list(names),
    )


def wait_for_chips(page: Any, *texts: str) -> None:
    """Wait until the switches have these texts."""
    page.wait_for_function(
        "texts => [...document.querySelectorAll('.lm-chip')].map(chip => chip.textContent).join() === texts",
        arg=",".join(texts),
    )


def test_strip_switches_loras_of_the_mix(board: Any, renderer: str) -> None:
    switched = lambda: sent(board, MIX)["switched_off"]  # noqa: E731
    assert board.locator(".lm-chip").count() == 0
    fill(board, "widget_ember", "widget_heart", "widget_moon")
    wait_for_chips(board, "1 ember", "2 heart", "3 moon")
    chips = board.locator(".lm-chip")
    assert chips.nth(1).get_attribute("title") == "widget_heart"
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


@pytest.mark.parametrize(
    ("names", "texts"),
    [
        (["legomole_nano_ember_v1", "legomole_nano_heart_v1"], ["1 ember", "2 heart"]),
        (["a-style", "b-style", "c"], ["1 a-style", "2 b-style", "3 c"]),
        (["same", "same"], ["1 same", "2 same"]),
        (["style", "style_v2"], ["1 style", "2 style_v2"]),
        (["only_one"], ["1 only_one"]),
    ],
)
def test_switches_show_the_part_of_the_name_that_differs(board: Any, names: list[str], texts: list[str]) -> None:
    fill(board, *names)
    wait_for_chips(board, *texts)


def test_switches_of_eight_long_names_are_all_visible(board: Any, renderer: str) -> None:
    """They wrap, none is cut, and the node grows with the change by the user."""
    fill(board, *(f"a_rather_long_name_{i}_of_a_style_{i}" for i in range(8)))
    board.wait_for_function("() => document.querySelectorAll('.lm-chip').length === 8")
    board.locator(".lm-row input[type=checkbox]").first.click()
    board.wait_for_function("() => document.querySelectorAll('.lm-chip').length === 7")
    settle(board)
    cut = board.evaluate(
        """() => { const strip = document.querySelector('.lm-strip'), area = strip.getBoundingClientRect();
            return [...strip.children].filter(chip => chip.scrollWidth > chip.clientWidth
                || chip.getBoundingClientRect().bottom > area.bottom + 1).length; }"""
    )
    assert cut == 0


ROUTES = {
    "subgraph and reroute": """
        const reroute = LiteGraph.createNode('Reroute');
        app.graph.add(reroute);
        list.connect(0, reroute, 0);
        reroute.connect(0, mix, socket());
        app.graph.convertToSubgraph(new Set([mix]));
        const { subgraph } = app.graph.nodes.find(node => node.isSubgraphNode?.());
        app.canvas.setGraph(subgraph);""",
    "list in a subgraph": "app.graph.convertToSubgraph(new Set([list]));",
    "bypassed node": """
        const between = LiteGraph.createNode('LegoMoLE_LoRAList');
        app.graph.add(between);
        between.mode = 4;
        list.connect(0, between, between.inputs.findIndex(input => input.name === 'lora_stack'));
        between.connect(0, mix, socket());""",
    "another list": """
        const between = LiteGraph.createNode('LegoMoLE_LoRAList');
        app.graph.add(between);
        list.connect(0, between, between.inputs.findIndex(input => input.name === 'lora_stack'));
        between.connect(0, mix, socket());""",
}


@pytest.mark.parametrize("route", ROUTES)
def test_switches_follow_links(board: Any, renderer: str, route: str) -> None:
    fill(board, "widget_ember", "widget_heart")
    wait_for_chips(board, "1 ember", "2 heart")
    board.evaluate(
        f"""() => {{
            const [list, mix] = ['LegoMoLE_LoRAList', 'LegoMoLE_MoLEMix'].map(
                type => app.graph.nodes.find(node => node.type === type));
            const socket = () => mix.inputs.findIndex(input => input.name === 'loras.lora0');
            {ROUTES[route]}
        }}"""
    )
    settle(board)
    board.evaluate("() => document.querySelectorAll('.lm-chip').forEach(chip => chip.dataset.before = 1)")
    board.wait_for_timeout(600)  # the switches are refreshed twice a second
    assert board.locator(".lm-chip").all_text_contents() == ["1 ember", "2 heart"]
    board.locator(".lm-chip:visible").nth(1).click()
    assert sent(board, MIX)["switched_off"] == "2"


def test_unknown_sources_get_no_switch_before_a_run(board: Any, renderer: str) -> None:
    """Behind a node whose output can be anything, one switch for two LoRAs would switch only the first."""
    fill(board, "widget_ember", "widget_heart")
    wait_for_chips(board, "1 ember", "2 heart")
    board.evaluate(
        """() => { const [list, mix] = ['LegoMoLE_LoRAList', 'LegoMoLE_MoLEMix'].map(
                type => app.graph.nodes.find(node => node.type === type));
            const other = LiteGraph.createNode('ComfySwitchNode');
            app.graph.add(other);
            list.connect(0, other, 0);
            other.connect(0, mix, mix.inputs.findIndex(input => input.name === 'loras.lora0')); }"""
    )
    board.wait_for_function("() => document.querySelector('.lm-strip').textContent.startsWith('Run once')")
    board.evaluate(  # what the server sends after a run
        """() => app.graph.nodes.find(node => node.type === 'LegoMoLE_MoLEMix').onExecuted(
            { experts: ['widget_ember', 'widget_heart'], text: ['mix of 2 LoRAs'] })"""
    )
    wait_for_chips(board, "1 ember", "2 heart")
    fill(board, "widget_moon")  # the names of the last run are no longer true
    board.wait_for_function("() => document.querySelector('.lm-strip').textContent.startsWith('Run once')")
