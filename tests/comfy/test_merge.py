"""Merging through a real graph: the picture from the merged LoRA is the one the saved file gives elsewhere."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from .graph import Graph
from .server import Server

pytestmark = pytest.mark.comfy

PAIRS = {"flux": ("flux_kohya", "flux_split"), "sd15": ("sd15_kohya", "sd15_diffusers")}


@pytest.mark.parametrize("base", PAIRS)
def test_merged_lora_paints_what_its_saved_file_paints(
    comfy: Server, files: dict[str, str], paint: Callable, base: str
) -> None:
    """Two dialects, two ranks -> LEGO Merge -> Apply -> picture; the saved file in the STOCK loader -> same picture."""
    graph = Graph(base)
    merged = graph.lego(*(graph.load(files[name], 0.9) for name in PAIRS[base]))
    graph.save(merged, f"same/{base}")
    ours, latent = paint(graph, graph.picture(*graph.apply(merged)))
    stock = Graph(base)
    theirs, stock_latent = paint(stock, stock.picture(*stock.stock(f"same/{base}_00001_.safetensors")))
    plain = Graph(base)
    _, plain_latent = paint(plain, plain.picture())

    torch.testing.assert_close(latent, stock_latent, rtol=0, atol=0)
    assert np.array_equal(ours, theirs)
    assert ours.std() > 5  # a picture, not one colour
    assert (latent - plain_latent).std() > 0.1 * plain_latent.std()  # and the LoRA matters
