"""The texts of our nodes in the real page, in both renderers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from ..comfy.server import Server
from .browser import run, settle

pytestmark = [pytest.mark.comfy, pytest.mark.page]

KEYS = [f"lora_te1_text_model_encoder_layers_{i}_mlp_fc1.lora_{part}.weight" for i in (0, 1) for part in ("up", "down")]


@pytest.fixture(scope="module")
def dropping(comfy: Server, files: dict[str, str]) -> str:
    """A file of which four keys fit nothing without CLIP."""
    tensors = load_file(comfy.loras / files["flux_kohya"])
    tensors |= {key: torch.zeros((8, 4) if "up" in key else (4, 8)) for key in KEYS}
    save_file(tensors, comfy.loras / "dropping.safetensors")
    return "dropping.safetensors"


def open_mix(page: Any, file: str, scale: float) -> None:
    prompt = {
        "1": {"class_type": "UNETLoader", "inputs": {"unet_name": "flux_nano.safetensors", "weight_dtype": "default"}},
        "2": {"class_type": "LegoMoLE_LoRAList", "inputs": {"loras": json.dumps([{"name": file}]), "apply": "chain"}},
        "3": {
            "class_type": "LegoMoLE_MoLEMix",
            "inputs": {
                "model": ["1", 0],
                "loras.lora0": ["2", 0],
                "scale": scale,
                "mixing": "delta",
                "granularity": "block",
                "clip_method": "concat",
            },
        },
        "4": {"class_type": "PreviewAny", "inputs": {"source": ["3", 2]}},
    }
    page.evaluate("prompt => app.loadApiJson(prompt, 'report')", prompt)
    page.evaluate(
        """() => { const mix = app.graph.nodes.find(node => node.type === 'LegoMoLE_MoLEMix');
            app.canvas.ds.scale = 1; app.canvas.ds.offset = [-mix.pos[0] + 300, -mix.pos[1] + 100];
            app.canvas.setDirty(true, true); }"""
    )
    settle(page)


def test_report_begins_with_the_dropped_keys_in_colour(page: Any, comfy: Server, dropping: str, renderer: str) -> None:
    """Every line of the report is a line on the node, no word is cut, and what comes first is visible."""
    open_mix(page, dropping, 1.0 if renderer == "canvas" else 1.1)
    run(page, comfy)
    page.wait_for_selector(".lm-report .lm-bad")
    lines = page.evaluate("() => [...document.querySelector('.lm-report').children].map(line => line.textContent)")
    report = page.evaluate(
        """() => app.graph.nodes.find(node => node.type === 'LegoMoLE_MoLEMix').widgets.find(
            widget => widget.name === '$$node-text-preview').value"""
    )
    assert lines[0].startswith("4 keys ")
    assert [line.strip() for line in report.split("\n")] == lines[-report.count("\n") - 1 :]
    assert any("mix of 1 LoRA" in line for line in lines)
    assert "DROPPED (4):" in lines
    shown = page.evaluate(
        """() => {
            const report = document.querySelector('.lm-report'), first = report.firstElementChild;
            const { top, bottom, height } = report.parentElement.getBoundingClientRect();
            const node = app.graph.nodes.find(node => node.type === 'LegoMoLE_MoLEMix');
            return {
                isColoured: getComputedStyle(first).color !== getComputedStyle(report).color,
                isFirstVisible: first.getBoundingClientRect().top >= top - 1
                    && first.getBoundingClientRect().bottom <= bottom + 1,
                wordBreak: getComputedStyle(report).wordBreak,
                overflow: report.scrollWidth - report.clientWidth,
                height,
                room: app.canvas.canvas.getBoundingClientRect().y + node.pos[1] + node.size[1]
                    + app.canvas.ds.offset[1] - bottom,
            };
        }"""
    )
    assert shown["isColoured"]
    assert shown["isFirstVisible"]
    assert shown["wordBreak"] == "normal"
    assert shown["overflow"] <= 0
    assert 100 <= shown["height"] <= 200
    assert shown["room"] >= 0


def test_report_is_shown_again_for_a_cached_result(page: Any, comfy: Server, dropping: str) -> None:
    """After the page has been opened again; the server runs nothing."""
    for _ in range(2):
        open_mix(page, dropping, 1.2)
        assert page.locator(".lm-report").count() == 0
        run(page, comfy)
        page.wait_for_selector(".lm-report .lm-bad")


def test_progress_text_is_shown_in_the_same_place(page: Any, comfy: Server, dropping: str, renderer: str) -> None:
    """Texts sent while a node runs; there is one widget for texts, ours."""
    open_mix(page, dropping, 1.0)
    page.evaluate(
        """() => { const { id } = app.graph.nodes.find(node => node.type === 'LegoMoLE_MoLEMix');
            for (const text of ['step, 1 of 9', 'step, 2 of 9'])
                app.api.dispatchCustomEvent('progress_text', { nodeId: String(id), text }); }"""
    )
    page.wait_for_function("() => document.querySelector('.lm-report')?.textContent === 'step, 2 of 9'")
    names = page.evaluate(
        "() => app.graph.nodes.find(node => node.type === 'LegoMoLE_MoLEMix').widgets.map(widget => widget.name)"
    )
    assert names.count("$$node-text-preview") == 1
