"""Merges in a real graph: the merged LoRA and its saved file give the same image."""

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
def test_merged_lora_gives_the_same_image_as_its_saved_file(
    comfy: Server, files: dict[str, str], sample: Callable, base: str
) -> None:
    """LoRAs of two dialects and ranks: LEGO Merge and Apply LoRA, against the saved file in the stock loader."""
    graph = Graph(base)
    merged = graph.lego(*(graph.load(files[name], 0.9) for name in PAIRS[base]))
    graph.save(merged, f"same/{base}")
    ours, latent = sample(graph, graph.picture(*graph.apply(merged)))
    stock = Graph(base)
    theirs, stock_latent = sample(stock, stock.picture(*stock.stock(f"same/{base}_00001_.safetensors")))
    plain = Graph(base)
    _, plain_latent = sample(plain, plain.picture())

    torch.testing.assert_close(latent, stock_latent, rtol=0, atol=0)
    assert np.array_equal(ours, theirs)
    assert ours.std() > 5  # not a single colour
    assert (latent - plain_latent).std() > 0.1 * plain_latent.std()  # the LoRA has an effect


def test_suggested_strengths_of_a_sum_are_measured_on_the_model(comfy: Server, files: dict[str, str]) -> None:
    """With words, the exact sum gets the strengths of prompts for both; without, those of the weights."""
    reports: list[str] = []
    for words in ("ember\nheart", ""):
        graph = Graph()
        merge = graph.merge("concat", graph.load(files["flux_kohya"]), graph.load(files["flux_split"]))
        graph.nodes[merge[0]]["inputs"] |= {"strengths": "suggested", "words": words}
        shown = {"class_type": "PreviewAny", "inputs": {"source": [merge[0], 1]}}
        run = comfy.run({**graph.nodes, "text": shown})
        reports.append(run.outputs["text"]["text"][0])
    assert "on prompts for several LoRAs the sum is predicted to be" in reports[0]
    assert "predicted errors" in reports[0]
    assert "each LoRA acts in the sum as it does alone" in reports[1]
    assert "on prompts for" not in reports[1]
