"""Calibrate, and merges with its statistics, in a real graph."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from .graph import Graph, Link
from .server import Server

pytestmark = pytest.mark.comfy


def test_one_lora_calibrated_on_its_own_prompts_gives_its_own_image(
    comfy: Server, files: dict[str, str], sample: Callable
) -> None:
    """With `lam` 0 only the LoRA's own prompts matter, so the result is that LoRA."""
    graph = Graph()
    lora = graph.load(files["flux_kohya"])
    statistics = graph.calibrate(lora, words="heart", prompts="heart\na dog")
    merged = graph.merge("calibrated", lora, rank="1x", lam=0.0, mu=3.0, joint_scale=1.2)
    graph.nodes[merged[0]]["inputs"]["statistics"] = statistics
    model, clip = graph.apply(merged)
    _, ours = sample(graph, graph.picture(model, clip))
    plain = Graph()
    _, stock = sample(plain, plain.picture(*plain.stock(files["flux_kohya"])))
    bare = Graph()
    _, base = sample(bare, bare.picture())
    assert (ours - stock).std() < 0.02 * (stock - base).std()


@pytest.mark.parametrize("method", ["calibrated", "lego"])
def test_two_loras_are_merged_with_statistics(comfy: Server, files: dict[str, str], method: str) -> None:
    graph = Graph()
    loras = [graph.load(files["flux_kohya"], 0.8), graph.load(files["flux_split"])]  # with fused and split q, k, v
    statistics = graph.calibrate(*loras)
    merged = (
        graph.lego(*loras)
        if method == "lego"
        else graph.merge(method, *loras, rank="1x", lam=1.0, mu=3.0, joint_scale=1.2)
    )
    graph.nodes[merged[0]]["inputs"]["statistics"] = statistics
    plain = graph.lego(*loras) if method == "lego" else graph.merge("svd", *loras, rank="1x")
    shown = [graph.add("PreviewAny", source=[node[0], 1]) for node in (merged, plain, statistics)]
    run = comfy.run(graph.nodes)
    texts = [str(run.outputs[node[0]]) for node in shown]
    assert "no statistics" not in texts[0]
    assert "measured 10 layers" in texts[2]
    assert texts[0] != texts[1]  # the statistics have an effect


@pytest.mark.parametrize(
    ("words", "loras", "expected"),
    [
        ("", ("flux_kohya", "flux_split"), "has no words"),
        ("ember style\nember style", ("flux_kohya", "flux_split"), "same word"),
        ("a\nb\nc", ("flux_kohya", "flux_split"), "more lines of words"),
        ("ember style\nheart", ("flux_kohya", "sd3_kohya"), "connect the base model the LoRA was trained for"),
    ],
)
def test_wrong_input_is_reported_on_the_node(
    comfy: Server, files: dict[str, str], words: str, loras: tuple[str, ...], expected: str
) -> None:
    graph = Graph()
    statistics = graph.calibrate(*[graph.load(files[name]) for name in loras], words=words)
    graph.add("PreviewAny", source=[statistics[0], 1])
    assert expected in comfy.fail(graph.nodes)


def test_other_loras_and_missing_statistics_are_refused(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    loras = [graph.load(files[name]) for name in ("flux_kohya", "flux_split", "flux_kohya_2")]
    statistics = graph.calibrate(*loras[:2])
    merged = graph.lego(loras[0], loras[2])
    graph.nodes[merged[0]]["inputs"]["statistics"] = statistics
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
    failure = comfy.fail(bare.nodes)
    assert "needs statistics" in failure
    assert "no words call for flux_kohya" in failure


def test_the_model_is_unchanged_afterwards(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    before = Graph()
    first = sample(before, before.picture(prompt="a tree"))[1]
    graph = Graph()
    statistics = graph.calibrate(graph.load(files["flux_kohya"]), words="heart", prompts="", seed=5)
    graph.add("PreviewAny", source=[statistics[0], 1])
    comfy.run(graph.nodes)
    after = Graph()
    node = after.picture(prompt="a tree")
    after.nodes[next(n for n in after.nodes if n.startswith("KSampler"))]["inputs"]["seed"] = 8
    sample(after, node)  # another seed, so that the next image is not from the cache
    assert torch.equal(sample(before, before.picture(prompt="a tree"))[1], first)


def merged_text(comfy: Server, graph: Graph, merged: Link) -> tuple[str, list[str]]:
    """The report of a merge, and the lines that its node showed while it measured."""
    graph.add("PreviewAny", source=[merged[0], 1])
    run = comfy.run(graph.nodes)
    lines = [data["text"] for data in run.of("progress_text") if data["node"] == merged[0]]
    return lines[-1], [line for line in lines if " of " in line and line.startswith("measuring")]


def test_a_merge_with_a_model_measures_by_itself_and_once(comfy: Server, files: dict[str, str]) -> None:
    """Two loaders and LEGO Merge: the words come with the LoRAs, and another rank or strength needs no new passes."""

    def run(rank: str, strength: float = 1.0, words: str = "heart", **settings: object) -> tuple[str, list[str]]:
        graph = Graph()
        loras = [graph.load(files["flux_kohya"], strength), graph.load(files["flux_split"])]
        for link, text in zip(loras, ("ember style", words), strict=True):
            graph.nodes[link[0]]["inputs"]["words"] = text
        return merged_text(comfy, graph, graph.lego(*loras, rank=rank, **settings))

    first, lines = run("1x", words="heart shape")
    assert "predicted errors" in first
    assert "this merge" in first
    assert lines
    for again in (run("2x", words="heart shape"), run("1x", 0.5, "heart shape")):
        assert "predicted errors" in again[0]
        assert not again[1]
    assert run("1x", words="hearts")[1]
    off, lines = run("1x", words="heart shape", keep_base="off")
    assert "predicted" not in off
    assert not lines


@pytest.mark.parametrize(
    ("words", "with_model", "note"),
    [("", True, "no words call for"), ("a\nb", False, "connect MODEL and CLIP to keep the base model")],
)
def test_a_merge_that_cannot_measure_says_why(
    comfy: Server, files: dict[str, str], words: str, with_model: bool, note: str
) -> None:
    graph = Graph()
    loras = [graph.load(files["flux_kohya"]), graph.load(files["flux_kohya_2"])]
    text, _ = merged_text(comfy, graph, graph.lego(*loras, with_model=with_model, words=words))
    assert note in text
    assert "merged rank" in text


@pytest.mark.parametrize("method", ["calibrated", "ssr"])
def test_methods_that_need_statistics_measure_them(comfy: Server, files: dict[str, str], method: str) -> None:
    graph = Graph()
    loras = [graph.load(files["flux_kohya"]), graph.load(files["flux_split"])]
    settings = {"lam": 1.0, "mu": 3.0, "joint_scale": 1.2} if method == "calibrated" else {}
    merged = graph.merge(method, *loras, rank="1x", **settings)
    graph.nodes[merged[0]]["inputs"]["words"] = "ember style\nheart"
    assert "predicted errors" in merged_text(comfy, graph, merged)[0]


def test_cancelled_measuring_leaves_nothing(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    merged = graph.lego(
        graph.load(files["flux_kohya"]), graph.load(files["flux_split"]), words="cancelled style\nheart"
    )
    graph.add("PreviewAny", source=[merged[0], 1])
    stored = comfy.base / "cache" / "legomole" / "statistics"
    before = set(stored.glob("*"))
    seen = len(comfy.messages)
    prompt = comfy.queue(graph.nodes)
    comfy.wait_for(
        "progress_text", lambda data: data in [m[1] for m in comfy.messages[seen:]] and "measuring" in data["text"]
    )
    comfy.post("/interrupt", {})
    assert comfy.wait(prompt).of("execution_interrupted")
    assert set(stored.glob("*")) == before
