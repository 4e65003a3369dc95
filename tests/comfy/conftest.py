"""Fixtures that read the results of a server, and measurements made by ComfyUI's own Python."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from .graph import Graph
from .server import Run, Server

Picture = tuple[np.ndarray, Tensor]


@pytest.fixture
def sample(comfy: Server) -> Callable[[Graph, str], Picture]:
    """Runs a graph; returns the image of its SaveImage node and the latent it was decoded from."""

    def run(graph: Graph, node: str) -> Picture:
        return picture_of(comfy, comfy.run(graph.nodes), node)

    return run


@pytest.fixture(scope="session")
def measure(comfy: Server, files: dict[str, str]) -> Callable[..., dict[str, Any]]:
    """Runs a script of this folder with ComfyUI's own Python; returns the JSON object it prints last."""

    def run(script: str, *arguments: str) -> dict[str, Any]:
        command = [comfy.python, Path(__file__).with_name(script), comfy.folder, comfy.base, *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
        assert result.returncode == 0, result.stderr[-4000:]
        return json.loads(result.stdout.splitlines()[-1])

    return run


def picture_of(comfy: Server, run: Run, node: str) -> Picture:
    """Return the image of a SaveImage node, and the latent it was decoded from."""
    number = node.removeprefix("SaveImage")
    return (
        np.asarray(Image.open(_output(comfy, run.outputs[node]["images"][0])), dtype=np.int16),
        load_file(_output(comfy, run.outputs[f"SaveLatent{number}"]["latents"][0]))["latent_tensor"],
    )


def _output(comfy: Server, entry: dict[str, str]) -> Path:
    return comfy.base / "output" / entry["subfolder"] / entry["filename"]
