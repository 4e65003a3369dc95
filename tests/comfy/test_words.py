"""MoLE Mix with words and without trained gates, and its warnings for prompts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from legomole.core.mole.trained import TrainedGates
from safetensors.torch import load_file, save_file

from .graph import Graph, Link
from .server import Run, Server
from .test_inputs import same
from .test_mole import gates_in, preview

pytestmark = pytest.mark.comfy

TAGS = "very detailed, soft light, sharp focus, high quality, centered, clean lines, simple background, award winning, "
WORDS = "ember style\nheart"


def mixed(comfy: Server, files: dict[str, str], prompt: str, words: str = WORDS, **options: object) -> Run:
    """Sample with words on MoLE Mix; the text of Gate Map's report is the output of the node ``text``."""
    graph = Graph()
    loras = [graph.load(files["flux_kohya"]), graph.load(files["flux_split"])]
    mix = graph.mix(*loras, clip=graph.clip, words=words, **options)
    graph.picture(mix, [mix[0], 1], prompt=prompt)
    chart = graph.add("LegoMoLE_GateMap", model=mix, after=["KSampler0", 0])
    return comfy.run(graph.nodes | preview(chart, 1))


def gates(run: Run) -> dict[str, float]:
    return gates_in(run.outputs["text"]["text"][0])


def node_text(run: Run) -> str:
    """The last text that stood on MoLE Mix."""
    return [data["text"] for data in run.of("progress_text") if data["node"] == "LegoMoLE_MoLEMix0"][-1]


@pytest.mark.parametrize("tags", ["", TAGS, TAGS * 3], ids=["bare", "8 tags", "24 tags"])
def test_each_lora_follows_its_words(comfy: Server, files: dict[str, str], tags: str) -> None:
    both = gates(mixed(comfy, files, f"{tags}a heart in ember style, {tags}"))
    style = gates(mixed(comfy, files, f"a house in ember style, {tags}"))
    none = gates(mixed(comfy, files, f"a house, {tags}"))
    assert min(both.values()) > 0.9
    assert style["flux_kohya"] > 0.9
    assert max(style["flux_split"], *none.values()) < 0.1


def test_the_node_says_which_words_call_for_which_lora(comfy: Server, files: dict[str, str]) -> None:
    text = node_text(mixed(comfy, files, "a heart"))
    assert "gates that follow the prompt's words" in text
    assert "[1] flux_kohya: strength 1, for ember style" in text
    assert "[2] flux_split: strength 1, for heart" in text
    assert "WARNING" not in text


def test_a_lora_without_words_is_always_on(comfy: Server, files: dict[str, str]) -> None:
    run = mixed(comfy, files, "a house", words="\nheart")
    assert gates(run)["flux_kohya"] == 1
    assert gates(run)["flux_split"] < 0.1
    assert "[1] flux_kohya: strength 1, always on" in node_text(run)


def test_words_of_a_lora_that_is_switched_off_are_left_out(comfy: Server, files: dict[str, str]) -> None:
    assert gates(mixed(comfy, files, "a heart", switched_off="1"))["flux_split"] > 0.9


def test_an_empty_line_takes_the_trigger_words_of_the_file(comfy: Server, files: dict[str, str]) -> None:
    folder = comfy.base / "models" / "loras"
    state = load_file(folder / f"{files['flux_kohya'].removesuffix('.safetensors')}.safetensors")
    save_file(state, folder / "with_trigger.safetensors", metadata={"modelspec.trigger_phrase": "ember style"})
    graph = Graph()
    loras = [graph.load("with_trigger.safetensors"), graph.load(files["flux_split"])]
    mix = graph.mix(*loras, clip=graph.clip, words="\nheart")
    graph.picture(mix, [mix[0], 1], prompt="a house in ember style")
    text = node_text(comfy.run(graph.nodes))
    assert "[1] with_trigger: strength 1, for ember style" in text


def test_words_without_clip_are_not_forgotten_silently(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    graph, plain = Graph(), Graph()
    images: list[object] = []
    for one, words in ((graph, WORDS), (plain, None)):
        mix = one.mix(one.load(files["flux_kohya"]), one.load(files["flux_split"]), words=words)
        images.append(sample(one, one.picture(mix)))
    same(*images)
    run = comfy.run(graph.nodes | preview(["LegoMoLE_MoLEMix0", 0], 2))
    assert "connect CLIP to let each LoRA come in only for prompts that contain its words" in str(run.outputs)


@pytest.mark.parametrize("shut", [True, False])
def test_the_node_warns_if_words_and_gates_disagree(comfy: Server, files: dict[str, str], shut: bool) -> None:
    """Gates whose biases were changed so that the second one is always shut, or always open."""
    graph = Graph()
    loras: list[Link] = [graph.load(files["flux_kohya"]), graph.load(files["flux_split"])]
    trained = graph.train(*loras, objective="router")
    graph.add("LegoMoLE_SaveGates", gates=trained, filename_prefix=f"bent/{shut}")
    comfy.run(graph.nodes)
    path = _gates_file(comfy, f"bent/{shut}")
    _bend(path, -9.0 if shut else 3.0)

    other = Graph()
    loras = [other.load(files["flux_kohya"]), other.load(files["flux_split"])]
    loaded = other.add("LegoMoLE_LoadGates", gates_name=f"bent/{shut}_00001_.safetensors")
    mix = other.mix(*loras, clip=other.clip, gates=loaded)
    prompt = "a heart in ember style" if shut else "a house in ember style"
    other.picture(mix, [mix[0], 1], prompt=prompt)
    text = node_text(comfy.run(other.nodes))
    expected = (
        "is nearly off although the prompt has its words" if shut else "is on although the prompt has none of its"
    )
    assert f"WARNING: flux_split {expected}" in text
    assert f"for the prompt '{prompt}'" in text
    assert "WARNING: flux_kohya" not in text


def _gates_file(comfy: Server, prefix: str) -> Path:
    return comfy.base / "models" / "legomole_gates" / f"{prefix}_00001_.safetensors"


def _bend(path: Path, bias: float) -> None:
    """Make the second LoRA's gates constant."""
    trained = TrainedGates.load(path)
    with torch.no_grad():
        for name in trained.gates.names:
            trained.gates[name].weight[1] = 0
            trained.gates[name].bias[1] = bias
    trained.save(path)
