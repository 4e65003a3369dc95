"""The live map of Gate Map in the real page, in both renderers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from .browser import settle

pytestmark = [pytest.mark.comfy, pytest.mark.page]

GATES = {
    "pass": 3,
    "labels": ["ember", "heart"],
    "scopes": ["double_blocks.0", "double_blocks.1", "single_blocks.0"],
    "gates": [[1.0, 0.0], [0.5, 0.25], [0.0, 2.0]],
}


def colour(page: Any, x: float, row: int) -> list[int]:
    """Return the colour of the map in a row, at a part of its width."""
    return page.evaluate(
        """([x, row]) => {
            const canvas = document.querySelector('.lm canvas');
            const map = canvas.height - 56 - 20; // without chart and title
            const y = 16 + (map * (row + 0.5)) / 3;
            return [...canvas.getContext('2d').getImageData(canvas.width * x, y, 1, 1).data];
        }""",
        [x, row],
    )


@pytest.fixture
def drawn(page: Any) -> Iterator[Any]:
    """A handle to the texts that are drawn on maps."""
    yield page.evaluate_handle(
        """() => {
            const drawn = [], prototype = CanvasRenderingContext2D.prototype, { fillText } = prototype;
            window.restore = () => (prototype.fillText = fillText);
            prototype.fillText = function (text) {
                if (this.canvas.closest?.('.lm')) drawn.push(text);
                return fillText.apply(this, arguments);
            };
            return drawn;
        }"""
    )
    page.evaluate("() => restore()")


def test_map_shows_the_gates_of_the_mix_before_it(page: Any, renderer: str, drawn: Any) -> None:
    """Rows have names, the scale ends at the largest gate; gates of other nodes are not shown."""
    mix, other = page.evaluate(
        """() => { const [mix, other, map, sampler] = ['LegoMoLE_MoLEMix', 'LegoMoLE_MoLEMix', 'LegoMoLE_GateMap',
                'ModelSamplingSD3'].map((type, i) => { const node = LiteGraph.createNode(type);
                app.graph.add(node); node.pos = [100 + 450 * (i % 3), 100 + 500 * Math.floor(i / 3)]; return node; });
            mix.connect(0, sampler, 0);
            sampler.connect(0, map, 0);
            return [mix.id, other.id]; }"""
    )
    page.wait_for_selector(".lm canvas")
    settle(page)
    drawn.evaluate("drawn => { drawn.length = 0; }")
    show = "data => { app.api.dispatchCustomEvent('legomole.gates', data); }"
    page.evaluate(show, {**GATES, "node": str(other)})
    settle(page)
    assert drawn.json_value() == []
    page.evaluate(show, {**GATES, "node": f"7:{mix}"})  # in a subgraph, ids have those of its nodes before them
    settle(page)
    label = page.locator(".lm canvas").get_attribute("aria-label")
    assert label == "mean gates: ember 0.50, heart 0.75"
    texts = drawn.json_value()
    assert [text for text in texts if text.startswith(("double", "single"))] == ["double 0", "double 1", "single 0"]
    assert {"ember", "heart", "pass 3", "2.0", "0"} <= set(texts)
    assert colour(page, 0.7, 2) == [253, 231, 37, 255]  # heart in the last row: the largest gate
    assert colour(page, 0.3, 2) == [48, 18, 80, 255]  # ember: 0
    assert colour(page, 0.7, 0) == [48, 18, 80, 255]
