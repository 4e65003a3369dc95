"""MoLE in a real graph: mixing, training, saving, loading, freezing, drawing, errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .conftest import picture_of
from .graph import Graph, Link
from .server import Refused, Server
from .test_inputs import same

pytestmark = pytest.mark.comfy

LEAK = "memory leak detected with model Bank"


@pytest.fixture
def pair(files: dict[str, str]) -> Callable[..., list[Link]]:
    """Load LoRA nodes of the two Flux LoRAs, in either order."""

    def load(graph: Graph, *, swapped: bool = False, strength: float = 1.0) -> list[Link]:
        loras = [graph.load(files["flux_kohya"], strength), graph.load(files["flux_split"], strength)]
        return loras[::-1] if swapped else loras

    return load


def preview(link: Link, output: int) -> dict:
    return {"text": {"class_type": "PreviewAny", "inputs": {"source": [link[0], output]}}}


def size_of(comfy: Server, entry: dict[str, str]) -> tuple[int, int]:
    with Image.open(comfy.base / "output" / entry["subfolder"] / entry["filename"]) as picture:
        return picture.size


def gates_in(report: str) -> dict[str, float]:
    """Return the mean gate of each LoRA, from Gate Map's report."""
    return {name: float(value) for name, value in re.findall(r"(\w+) ([\d.e-]+)(?=[,;])", report.partition(": ")[2])}


def mean_gates(comfy: Server, pair: Callable, prompt: str, **training: object) -> dict[str, float]:
    graph = Graph()
    loras = pair(graph)
    mix = graph.mix(*loras, gates=graph.train(*loras, **training))
    graph.picture(mix, prompt=prompt)
    chart = graph.add("LegoMoLE_GateMap", model=mix, after=["KSampler0", 0])
    return gates_in(comfy.run(graph.nodes | preview(chart, 1)).outputs["text"]["text"][0])


# ---- mixing


@pytest.mark.parametrize("base", ["flux", "sd15"])
def test_mix_without_gates_gives_the_image_of_the_stock_chain(
    files: dict[str, str], sample: Callable, base: str
) -> None:
    """Also in the text encoders, merged by the exact sum."""
    names = {
        "flux": ("flux_kohya", "flux_split", "flux_split"),
        "sd15": ("sd15_kohya", "sd15_diffusers", "sd15_respelled"),
    }[base]
    graph, stock = Graph(base), Graph(base)
    mix = graph.mix(graph.load(files[names[0]], 0.6, 0.6), graph.load(files[names[1]], 0.9, 0.9), clip=graph.clip)
    same(
        sample(graph, graph.picture(mix, [mix[0], 1])),
        sample(stock, stock.picture(*stock.stock(files[names[0]], files[names[2]], strengths=[0.6, 0.9]))),
    )


@pytest.mark.parametrize("off", ["2", "flux_split"])
def test_with_one_switched_off_the_other_acts_alone(files: dict, sample: Callable, pair: Callable, off: str) -> None:
    graph, stock = Graph(), Graph()
    mix = graph.mix(*pair(graph), switched_off=off)
    same(sample(graph, graph.picture(mix)), sample(stock, stock.picture(*stock.stock(files["flux_kohya"]))))


def test_base_model_is_unchanged_after_a_mix(comfy: Server, sample: Callable, pair: Callable) -> None:
    plain, mixed = Graph(), Graph()
    node = plain.picture()
    for i in range(8):  # ComfyUI keeps the inputs of a node that failed in an earlier test for some prompts
        start, other = len(comfy.log.read_text()), Graph()
        sample(other, other.picture(prompt=f"before {i}"))
        if LEAK not in comfy.log.read_text()[start:]:
            break
    before = sample(plain, node)
    start = len(comfy.log.read_text())
    between = sample(mixed, mixed.picture(mixed.mix(*pair(mixed))))
    run = comfy.run(plain.nodes)  # the same loaded model; ComfyUI's cache no longer has the mix
    assert "KSampler0" in run.executed
    assert "UNETLoader0" not in run.executed
    after = picture_of(comfy, run, node)
    assert torch.equal(before[1], after[1])
    assert np.array_equal(before[0], after[0])
    assert not torch.equal(between[1], after[1])
    assert LEAK not in comfy.log.read_text()[start:]


# ---- training


def test_training_lowers_the_loss_and_the_gates_open_for_their_words(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    loras = pair(graph)
    trained = graph.train(*loras, steps=60, learning_rate=0.02, reads="hidden")  # others start near the goal
    graph.add("SaveImage", images=[trained[0], 1], filename_prefix="test/loss")
    run = comfy.run(graph.nodes | preview(trained, 2))
    first, last = map(
        float, re.search(r"loss ([\d.e-]+) at the first step, ([\d.e-]+)", run.outputs["text"]["text"][0]).groups()
    )
    assert last < 0.5 * first
    assert size_of(comfy, run.outputs["SaveImage0"]["images"][0]) == (640, 360)
    assert len(run.of("progress")) > 3 or len(run.of("progress_state")) > 3

    style = mean_gates(comfy, pair, "ember style", steps=12)
    heart = mean_gates(comfy, pair, "heart", steps=12)
    none = mean_gates(comfy, pair, "a dog", steps=12)
    assert style["flux_kohya"] > 2 * style["flux_split"]
    assert heart["flux_split"] > 2 * heart["flux_kohya"]
    assert max(none.values()) < 0.5 * min(style["flux_kohya"], heart["flux_split"])


def test_the_router_needs_no_training(comfy: Server, pair: Callable) -> None:
    style = mean_gates(comfy, pair, "ember style", objective="router")
    both = mean_gates(comfy, pair, "heart in ember style", objective="router")
    none = mean_gates(comfy, pair, "a dog", objective="router")
    assert style["flux_kohya"] > 0.9 > 0.1 > style["flux_split"]
    assert min(both.values()) > 0.9
    assert max(none.values()) < 0.1


@pytest.mark.parametrize(
    "settings",
    [
        {"reads": "hidden", "granularity": "layer"},
        {"reads": "experts", "activation": "softmax", "balance": 0.5},
        {"reads": "experts", "activation": "softmax-null", "save_memory": False},
        {"granularity": "network"},
        {"granularity": "matrix", "reads": "hidden"},
    ],
    ids=lambda s: "-".join(str(v) for v in s.values()),
)
def test_every_kind_of_gate_trains_and_samples(comfy: Server, sample: Callable, pair: Callable, settings: dict) -> None:
    graph = Graph()
    loras = pair(graph)
    gates = graph.train(*loras, steps=3, **settings)
    ours = sample(graph, graph.picture(graph.mix(*loras, gates=gates)))
    plain = Graph()
    assert not torch.equal(ours[1], sample(plain, plain.picture())[1])
    assert torch.isfinite(ours[1]).all()


def test_only_common_choices_are_offered(comfy: Server, pair: Callable) -> None:
    """The paper's gates for a single image size and its CLIP loss are available in Python only."""
    inputs = comfy.get("/object_info/LegoMoLE_TrainGates")["LegoMoLE_TrainGates"]["input"]["required"]
    assert inputs["objective"][1]["options"] == ["distil", "denoise", "router"]
    assert inputs["reads"][1]["options"] == ["text", "hidden", "experts"]
    for settings in ({"reads": "flat"}, {"objective": "clip"}):
        graph = Graph()
        graph.add("LegoMoLE_SaveGates", gates=graph.train(*pair(graph), **settings), filename_prefix="refused")
        with pytest.raises(Refused, match="not in list"):
            comfy.queue(graph.nodes)


@pytest.mark.parametrize("captioned", [False, True])
def test_gates_learn_from_images(comfy: Server, pair: Callable, captioned: bool) -> None:
    graph = Graph()
    loras = pair(graph)
    latents = [graph.add("LatentBatch", samples1=graph.empty(), samples2=graph.empty()) for _ in loras]
    trained = graph.train(
        *loras,
        objective="denoise",
        steps=6,
        latents__latents0=latents[0],
        latents__latents1=latents[1],
        captions__captions1=graph.add("CLIPTextEncode", text="my heart", clip=graph.clip) if captioned else None,
    )
    run = comfy.run(graph.nodes | preview(trained, 2))
    assert "at the last of 6" in run.outputs["text"]["text"][0]


# ---- files


def saved_gates(comfy: Server, prefix: str) -> Path:
    return comfy.base / "models" / "legomole_gates" / f"{prefix}_00001_.safetensors"


def test_saved_gates_only_work_with_their_loras(
    comfy: Server, files: dict[str, str], sample: Callable, pair: Callable
) -> None:
    graph = Graph()
    loras = pair(graph)
    gates = graph.train(*loras)
    graph.add("LegoMoLE_SaveGates", gates=gates, filename_prefix="kept/gates")
    trained = sample(graph, graph.picture(graph.mix(*loras, gates=gates)))
    name = "kept/gates_00001_.safetensors"
    with safe_open(saved_gates(comfy, "kept/gates"), "pt") as file:
        assert file.metadata()["base"] == "Flux"

    other = Graph()
    loaded = other.add("LegoMoLE_LoadGates", gates_name=name)
    same(sample(other, other.picture(other.mix(*pair(other, swapped=True), gates=loaded))), trained)

    foreign = Graph()
    loaded = foreign.add("LegoMoLE_LoadGates", gates_name=name)
    foreign.picture(foreign.mix(foreign.load(files["flux_kohya_2"]), gates=loaded))
    message = comfy.fail(foreign.nodes)
    assert "The gates were trained with other LoRAs." in message
    assert "flux_kohya_2" in message

    alone = Graph()  # only one of their LoRAs: the other counts as switched off
    loaded = alone.add("LegoMoLE_LoadGates", gates_name=name)
    sample(alone, alone.picture(alone.mix(pair(alone)[0], gates=loaded)))


def test_a_file_that_holds_no_gates_is_refused(comfy: Server, pair: Callable) -> None:
    path = saved_gates(comfy, "not_gates")
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a": torch.zeros(2)}, path)
    graph = Graph()
    gates = graph.add("LegoMoLE_LoadGates", gates_name=path.name)
    graph.picture(graph.mix(*pair(graph), gates=gates))
    assert "This file holds no gates." in comfy.fail(graph.nodes)


def test_cancelled_training_is_resumed(comfy: Server, pair: Callable) -> None:
    """With the same gates in the end as from a training that was not cancelled."""
    steps, prepared = 60, 32  # training steps; examples that are predicted before

    def graph(prefix: str) -> Graph:
        one = Graph()
        one.add("LegoMoLE_SaveGates", gates=one.train(*pair(one), steps=steps, seed=4), filename_prefix=prefix)
        return one

    cut = graph("cut/gates")
    prompt_id = comfy.queue(cut.nodes)
    comfy.wait_for(
        "progress",
        lambda data: data["prompt_id"] == prompt_id and data["max"] == steps and data["value"] > 15,
        timeout=240,  # about a hundred prompts are encoded first
    )
    comfy.post("/interrupt", {})
    run = comfy.wait(prompt_id)
    assert run.of("execution_interrupted")
    interrupted = sorted((comfy.base / "models" / "legomole_gates").glob("interrupted_*"))
    with safe_open(interrupted[-1], "pt") as file:
        assert f"of {steps} steps" in file.metadata()["training"]

    resumed = comfy.run(cut.nodes)
    assert prepared not in {data["max"] for data in resumed.of("progress")}
    whole = graph("whole/gates")
    whole.nodes["LegoMoLE_TrainGates0"]["inputs"]["prompts"] += "\n"  # the same training, but not from ComfyUI's cache
    fresh = comfy.run(whole.nodes)
    assert "LegoMoLE_TrainGates0" in fresh.executed
    assert prepared in {data["max"] for data in fresh.of("progress")}
    a, b = load_file(saved_gates(comfy, "cut/gates")), load_file(saved_gates(comfy, "whole/gates"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    unfinished = comfy.base / "user" / "legomole" / "unfinished"
    assert not any(unfinished.rglob("*.safetensors"))


# ---- freezing and drawing


@pytest.mark.parametrize("trained", [False, True])
def test_frozen_mix_gives_the_image_of_the_mix(comfy: Server, sample: Callable, pair: Callable, trained: bool) -> None:
    """For the prompt it was frozen for, because gates that read the text are the same at every step."""
    graph, stock = Graph(), Graph()
    loras = pair(graph)
    mix = graph.mix(*loras, gates=graph.train(*loras) if trained else None, scale=0.8)
    positive = graph.add("CLIPTextEncode", text="heart", clip=graph.clip)
    frozen = graph.add(
        "LegoMoLE_FreezeToLoRA",
        **{
            "model": mix,
            "positive": positive,
            "latent_image": graph.empty(),
            "method": "concat",
            "steps": 2,
            "seed": 1,
        },
    )
    graph.save(frozen, f"frozen/{trained}")
    ours = sample(graph, graph.picture(mix, prompt="heart"))
    same(ours, sample(stock, stock.picture(*stock.stock(f"frozen/{trained}_00001_.safetensors"), prompt="heart")))


def test_gate_map_draws_every_scope(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    mix = graph.mix(*pair(graph))
    graph.picture(mix)
    chart = graph.add("LegoMoLE_GateMap", model=mix, after=["KSampler0", 0])
    graph.add("SaveImage", images=chart, filename_prefix="test/map")
    run = comfy.run(graph.nodes | preview(chart, 1))
    assert gates_in(run.outputs["text"]["text"][0]) == {"flux_kohya": 1.0, "flux_split": 1.0}
    _, height = size_of(comfy, run.outputs["SaveImage1"]["images"][0])
    assert height > 72 + 3 * 22  # double block, single block, layers outside of blocks
    assert run.outputs["LegoMoLE_GateMap0"]["images"]


# ---- errors


def failing(comfy: Server, graph: Graph, model: Link) -> str:
    graph.picture(model)
    return comfy.fail(graph.nodes)


def test_lora_of_another_architecture(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    message = failing(comfy, graph, graph.mix(graph.load(files["sd15_kohya"])))
    assert "ComfyUI finds nothing in this LoRA for the connected model." in message


def test_switching_off_a_lora_that_is_not_there(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    message = failing(comfy, graph, graph.mix(*pair(graph), switched_off="3"))
    assert "There is no such LoRA to switch off." in message


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"words": "ember style"}, "LoRA number 2 has no words that name its concept."),
        ({"words": "a\nb\nc"}, "There are more lines of words than LoRAs."),
        ({"words": "heart\nheart"}, "LoRAs number 1 and 2 are named by the same word."),
        ({"prompts": "ember style\na dog"}, "None of the prompts names LoRA number 2."),
        ({"objective": "denoise"}, "The denoising objective needs images."),
        ({"objective": "router", "reads": "hidden"}, "The router is for gates that read the text."),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_training_refuses(comfy: Server, pair: Callable, settings: dict, words: str) -> None:
    graph = Graph()
    loras = pair(graph)
    assert words in failing(comfy, graph, graph.mix(*loras, gates=graph.train(*loras, **settings)))


def test_training_refuses_a_lora_of_strength_0_and_a_softmax_of_one(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    loras = pair(graph, strength=0.0)
    message = failing(comfy, graph, graph.mix(*loras, gates=graph.train(*loras)))
    assert "A LoRA of strength 0 adds nothing" in message
    graph = Graph()
    lora = pair(graph)[0]
    settings = {"activation": "softmax", "words": "ember style", "prompts": ""}
    message = failing(comfy, graph, graph.mix(lora, gates=graph.train(lora, **settings)))
    assert "A softmax over one LoRA is always 1" in message


def test_output_mixing_needs_gates_per_block(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    assert "Output mixing mixes whole blocks." in failing(
        comfy, graph, graph.mix(*pair(graph), mixing="output", granularity="layer")
    )


def test_gate_map_and_freeze_need_a_mix(comfy: Server) -> None:
    graph = Graph()
    graph.picture()
    graph.add("LegoMoLE_GateMap", model=graph.model, after=["KSampler0", 0])
    assert "There is no mix on this model." in comfy.fail(graph.nodes | preview(["LegoMoLE_GateMap0", 0], 1))


def test_words_come_from_the_file(comfy: Server, files: dict[str, str]) -> None:
    """For an empty line the trigger words in the file's metadata are used."""
    state = load_file(comfy.loras / files["flux_kohya"])
    save_file(state, comfy.loras / "triggered.safetensors", {"modelspec.trigger_phrase": "ember style"})
    graph = Graph()
    loras = [graph.load("triggered.safetensors"), graph.load(files["flux_split"])]
    gates = graph.train(*loras, words="\nheart", steps=1)
    graph.add("LegoMoLE_SaveGates", gates=gates, filename_prefix="words/gates")
    comfy.run(graph.nodes)
    with safe_open(saved_gates(comfy, "words/gates"), "pt") as file:
        assert json.loads(file.metadata()["training"])["concepts"] == [["ember style"], ["heart"]]
