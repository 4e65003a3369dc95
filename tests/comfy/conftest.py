"""What comes out of the server."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from .graph import Graph
from .server import Run, Server

Picture = tuple[np.ndarray, Tensor]


@pytest.fixture
def paint(comfy: Server) -> Callable[[Graph, str], Picture]:
    """Run a graph; the picture of its saving node and the latent it was made from."""

    def run(graph: Graph, node: str) -> Picture:
        return picture_of(comfy, comfy.run(graph.nodes), node)

    return run


def picture_of(comfy: Server, run: Run, node: str) -> Picture:
    number = node.removeprefix("SaveImage")
    return (
        np.asarray(Image.open(_output(comfy, run.outputs[node]["images"][0])), dtype=np.int16),
        load_file(_output(comfy, run.outputs[f"SaveLatent{number}"]["latents"][0]))["latent_tensor"],
    )


def _output(comfy: Server, entry: dict[str, str]) -> Path:
    return comfy.base / "output" / entry["subfolder"] / entry["filename"]
