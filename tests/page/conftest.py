"""One browser for all tests of the page, with files for LoRA List."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from ..comfy.server import Server
from .browser import open_empty, opened, setting, settle

HOSTILE = "<img src=x onerror=document.title='owned'>"
_pixel = io.BytesIO()
Image.new("RGB", (1, 1)).save(_pixel, "png")
DOT = f"data:image/png;base64,{base64.b64encode(_pixel.getvalue()).decode()}"
METADATA = {
    "ember": {
        "modelspec.trigger_phrase": "ember style, burning",
        "ss_base_model_version": "flux1",
        "modelspec.thumbnail": DOT,
        "ss_network_module": "networks.lora",
    },
    "heart": {"modelspec.trigger_phrase": HOSTILE, "ss_base_model_version": HOSTILE},
    "moon": {},
}


@pytest.fixture(scope="session")
def tab(comfy: Server) -> Iterator[Any]:
    """The page of the server, open for all tests of a process."""
    for name, metadata in METADATA.items():
        save_file({"a": torch.zeros(1)}, comfy.loras / f"widget_{name}.safetensors", metadata)
    (comfy.loras / "widget_moon.preview.png").write_bytes(_pixel.getvalue())
    described = {"baseModel": "Pony", "trainedWords": ["moon, night"], "model": {"name": HOSTILE, "tags": ["style"]}}
    (comfy.loras / "widget_moon.civitai.info").write_text(json.dumps(described))
    (comfy.loras / "widget_moon.metadata.json").write_text(json.dumps({"notes": "Use it\nat 0.7."}))
    with opened(comfy, (1400, 1000)) as tab:
        yield tab


@pytest.fixture
def page(tab: Any) -> Any:
    """The page with an empty workflow at zoom 1."""
    open_empty(tab)
    tab.evaluate("() => { app.canvas.ds.scale = 1; app.canvas.ds.offset = [0, 0]; app.canvas.setDirty(true, true); }")
    return tab


@pytest.fixture(params=["canvas", "vue"])
def renderer(tab: Any, request: pytest.FixtureRequest) -> Iterator[str]:
    """Both ways in which the page draws nodes."""
    setting(tab, "Comfy.VueNodes.Enabled", request.param == "vue")
    yield request.param
    setting(tab, "Comfy.VueNodes.Enabled", False)


@pytest.fixture
def board(page: Any) -> Any:
    """The page with a LoRA List connected to a MoLE Mix, at zoom 1."""
    page.evaluate(
        """() => {
            const list = LiteGraph.createNode('LegoMoLE_LoRAList');
            const mix = LiteGraph.createNode('LegoMoLE_MoLEMix');
            for (const [node, x] of [[list, 80], [mix, 520]]) { app.graph.add(node); node.pos = [x, 120]; }
            list.connect(0, mix, mix.inputs.findIndex(input => input.name === 'loras.lora0'));
            app.canvas.setDirty(true, true);
        }"""
    )
    settle(page)
    return page
