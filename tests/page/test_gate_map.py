"""The live map of Gate Map in the real page, in both renderers."""

from __future__ import annotations

import base64
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


def encoded(*values: int) -> str:
    return base64.b64encode(bytes(values)).decode()


# of 4 x 2 positions the left half for ember, everything at half strength for heart
REGIONS = {
    **GATES,
    "sampler": "9",
    "labels": ["ember", "moon", "heart"],
    "gates": [[1.0, 1.0, 1.0]] * 3,
    "regions": {"width": 4, "height": 2, "maps": [encoded(*[255, 255, 0, 0] * 2), None, encoded(*[128] * 8)]},
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


def picture_colour(page: Any, x: float) -> list[int]:
    """The colour of the picture at a part of its width; it takes 0.42 of the canvas, at the right."""
    return page.evaluate(
        """x => {
            const canvas = document.querySelector('.lm canvas');
            const width = canvas.width * 0.42;
            return [...canvas.getContext('2d').getImageData(canvas.width - width * (1 - x), 16 + width / 4, 1, 1).data];
        }""",
        x,
    )


def test_regions_are_laid_on_the_preview_of_the_sampler(page: Any, renderer: str, drawn: Any) -> None:
    """Each region has the colour of its LoRA. Until the first preview of a run the ground is grey."""
    mix = page.evaluate(
        """() => { const [mix, map] = ['LegoMoLE_MoLEMix', 'LegoMoLE_GateMap'].map((type, i) => {
                const node = LiteGraph.createNode(type); app.graph.add(node);
                node.pos = [100 + 450 * i, 100]; return node; });
            mix.connect(0, map, 0);
            return mix.id; }"""
    )
    page.wait_for_selector(".lm canvas")
    settle(page)
    show = "data => { app.api.dispatchCustomEvent('legomole.gates', data); }"
    preview = """async ([nodeId, colour]) => {
        const canvas = document.createElement('canvas'), pen = canvas.getContext('2d');
        pen.fillStyle = colour;
        pen.fillRect(0, 0, canvas.width, canvas.height);
        const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));
        app.api.dispatchCustomEvent('b_preview_with_metadata', { blob, nodeId, displayNodeId: nodeId });
        await new Promise(next => setTimeout(next, 30)); }"""
    ember, heart = (76, 155, 232), (85, 176, 107)  # of LINE_COLORS, the first and the third

    def shown(x: float, background: int) -> None:
        both = [(255 * a + 128 * b) / 383 for a, b in zip(ember, heart, strict=True)]
        tint, alpha = (both, 0.6) if x < 0.5 else (heart, 0.6 * 128 / 255)
        expected = [round(background + (value - background) * alpha) for value in tint]
        assert picture_colour(page, x)[:3] == pytest.approx(expected, abs=2)

    page.evaluate(show, {**REGIONS, "node": str(mix)})
    settle(page)
    label = page.locator(".lm canvas").get_attribute("aria-label")
    assert label.endswith("; regions: ember 50%, heart 50% of the picture")
    assert "regions" in drawn.json_value()
    shown(0.2, 128)
    shown(0.8, 128)
    page.evaluate(preview, ["8", "#ffffff"])  # of another sampler
    settle(page)
    shown(0.2, 128)
    page.evaluate(preview, ["9", "#ffffff"])
    settle(page)
    shown(0.2, 255)
    shown(0.8, 255)
    page.evaluate(show, {**REGIONS, "node": str(mix), "pass": 1})
    settle(page)
    shown(0.8, 128)
    page.evaluate(show, {**GATES, "node": str(mix), "pass": 2})  # without regions the gates have all the width
    settle(page)
    assert colour(page, 0.7, 2) == [253, 231, 37, 255]
