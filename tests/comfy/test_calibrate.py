"""Calibrate, and the merges that use what it measured, in a real ComfyUI."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .graph import Graph
from .server import Server

pytestmark = pytest.mark.comfy


def test_one_lora_calibrated_on_its_own_prompts_paints_what_it_paints(
    comfy: Server, files: dict[str, str], paint: Callable
) -> None:
    """With the weight of leaving the rest alone at 0 there is nothing to give way to: W is that LoRA."""
    graph = Graph()
    lora = graph.load(files["flux_kohya"])
    found = graph.calibrate(lora, words="heart", prompts="heart\na dog")
    merged = graph.merge("calibrated", lora, rank="1x", lam=0.0, mu=3.0, joint_scale=1.2)
    graph.nodes[merged[0]]["inputs"]["statistics"] = found
    model, clip = graph.apply(merged)
    _, ours = paint(graph, graph.picture(model, clip))
    plain = Graph()
    _, stock = paint(plain, plain.picture(*plain.stock(files["flux_kohya"])))
    bare = Graph()
    _, base = paint(bare, bare.picture())
    assert (ours - stock).std() < 0.02 * (stock - base).std()


@pytest.mark.parametrize("method", ["calibrated", "lego"])
def test_two_loras_merge_with_what_was_measured(comfy: Server, files: dict[str, str], method: str) -> None:
    graph = Graph()
    loras = [graph.load(files["flux_kohya"], 0.8), graph.load(files["flux_split"])]  # fused and split q, k, v
    found = graph.calibrate(*loras)
    merged = (
        graph.lego(*loras)
        if method == "lego"
        else graph.merge(method, *loras, rank="1x", lam=1.0, mu=3.0, joint_scale=1.2)
    )
    graph.nodes[merged[0]]["inputs"]["statistics"] = found
    plain = graph.lego(*loras) if method == "lego" else graph.merge("svd", *loras, rank="1x")
    shown = [graph.add("PreviewAny", source=[node[0], 1]) for node in (merged, plain, found)]
    run = comfy.run(graph.nodes)
    texts = [str(run.outputs[node[0]]) for node in shown]
    assert "no statistics" not in texts[0]
    assert "measured 10 layers" in texts[2]
    assert texts[0] != texts[1]  # another merge than without


@pytest.mark.parametrize(
    ("words", "loras", "expected"),
    [
        ("", ("flux_kohya", "flux_split"), "has no words"),
        ("ember style\nember style", ("flux_kohya", "flux_split"), "same word"),
        ("a\nb\nc", ("flux_kohya", "flux_split"), "more lines of words"),
        ("ember style\nheart", ("flux_kohya", "sd3_kohya"), "connect the base model the LoRA was trained for"),
    ],
)
def test_bad_input_is_told_on_the_node(
    comfy: Server, files: dict[str, str], words: str, loras: tuple[str, ...], expected: str
) -> None:
    graph = Graph()
    found = graph.calibrate(*[graph.load(files[name]) for name in loras], words=words)
    graph.add("PreviewAny", source=[found[0], 1])
    assert expected in comfy.fail(graph.nodes)


def test_other_loras_and_missing_statistics_are_refused(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    loras = [graph.load(files[name]) for name in ("flux_kohya", "flux_split", "flux_kohya_2")]
    found = graph.calibrate(*loras[:2])
    merged = graph.lego(loras[0], loras[2])
    graph.nodes[merged[0]]["inputs"]["statistics"] = found
    graph.add("PreviewAny", source=[merged[0], 1])
    assert "not measured with this LoRA" in comfy.fail(graph.nodes)

    nameless = Graph()
    loras = [nameless.load(files[name]) for name in ("flux_kohya", "flux_kohya_2")]
    merged = nameless.lego(*loras, with_model=False)
    nameless.nodes[merged[0]]["inputs"]["statistics"] = nameless.calibrate(*loras)
    nameless.add("PreviewAny", source=[merged[0], 1])
    assert "connect the same model" in comfy.fail(nameless.nodes)

    bare = Graph()
    merged = bare.merge("calibrated", bare.load(files["flux_kohya"]), rank="1x", lam=1.0, mu=3.0, joint_scale=1.2)
    bare.add("PreviewAny", source=[merged[0], 1])
    assert "needs statistics" in comfy.fail(bare.nodes)


def test_the_model_is_left_as_it_was(comfy: Server, files: dict[str, str], paint: Callable) -> None:
    before = Graph()
    first = paint(before, before.picture(prompt="a tree"))[1]
    graph = Graph()
    found = graph.calibrate(graph.load(files["flux_kohya"]), words="heart", prompts="", seed=5)
    graph.add("PreviewAny", source=[found[0], 1])
    comfy.run(graph.nodes)
    after = Graph()
    node = after.picture(prompt="a tree")
    after.nodes[next(n for n in after.nodes if n.startswith("KSampler"))]["inputs"]["seed"] = 8
    paint(after, node)  # another seed, so that the next is not from the cache
    assert torch.equal(paint(before, before.picture(prompt="a tree"))[1], first)
