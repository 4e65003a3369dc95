"""The Region node, the region sockets of MoLE Mix, and start and end steps, in a real graph."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from .graph import Graph, Link
from .server import Refused, Run, Server
from .test_lora_list import row, rows
from .test_mole import preview

pytestmark = pytest.mark.comfy

LEFT = {"x": 0.0, "y": 0.0, "width": 0.5, "height": 1.0, "invert": False, "feather": 0.0}


def region(graph: Graph, **settings: Any) -> Link:
    return graph.add("LegoMoLE_Region", **{**LEFT, **settings})


def saved(comfy: Server, run: Run, node: str) -> np.ndarray:
    """The first image of an output node, ``(H, W, 3)`` of 0 .. 255."""
    entry = run.outputs[node]["images"][0]
    folder = comfy.base / entry["type"] / entry["subfolder"]
    return np.asarray(Image.open(folder / entry["filename"]).convert("RGB"), dtype=np.int16)


def mask_of(comfy: Server, graph: Graph, mask: Link) -> tuple[np.ndarray, Run]:
    """A mask's values ``(H, W)`` of 0 .. 255, and the run."""
    graph.add("SaveImage", images=graph.add("MaskToImage", mask=mask), filename_prefix="test/mask")
    run = comfy.run(graph.nodes)
    return saved(comfy, run, "SaveImage0")[..., 0], run


def report(comfy: Server, graph: Graph, mix: Link) -> str:
    return comfy.run(graph.nodes | preview(mix, 2)).outputs["text"]["text"][0]


# ---- Region


def test_a_box_has_the_shape_of_the_picture_and_is_shown_on_it(comfy: Server) -> None:
    graph = Graph()
    picture = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0xCCCCCC)
    mask, run = mask_of(comfy, graph, region(graph, x=0.25, width=0.25, picture=picture))
    assert mask.shape == (341, 512)
    assert (mask[:, 128:256] == 255).all()
    assert (mask[:, :128] == 0).all()
    assert (mask[:, 256:] == 0).all()
    shown = saved(comfy, run, "LegoMoLE_Region0")
    assert shown.shape == (341, 512, 3)
    assert shown[0, 0].tolist() == [132, 132, 132]  # 0.65 of the picture
    red, green, blue = shown[0, 200]
    assert red > green > blue


def test_a_region_without_a_picture_is_square_and_a_latent_gives_its_shape(comfy: Server) -> None:
    graph = Graph()
    assert mask_of(comfy, graph, region(graph, invert=True))[0].shape == (512, 512)
    graph = Graph()
    latent = graph.add("EmptyLatentImage", width=64, height=128, batch_size=2)
    mask, run = mask_of(comfy, graph, region(graph, invert=True, picture=latent))
    assert mask.shape == (512, 256)
    assert (mask[:, 128:] == 255).all()
    assert (mask[:, :128] == 0).all()
    assert saved(comfy, run, "LegoMoLE_Region0").shape == (512, 256, 3)


def test_a_mask_keeps_its_size_and_mask_nodes_come_before_and_after(comfy: Server) -> None:
    graph = Graph()
    solid = graph.add("SolidMask", value=1.0, width=40, height=20)
    empty = graph.add("SolidMask", value=0.0, width=80, height=20)
    painted = graph.add("MaskComposite", destination=empty, source=solid, x=0, y=0, operation="add")
    soft = region(graph, mask=painted, feather=0.4, invert=True)
    mask, _ = mask_of(comfy, graph, graph.add("InvertMask", mask=soft))
    assert mask.shape == (20, 80)
    assert (mask[:, :35] == 255).all()
    assert (mask[:, 45:] == 0).all()
    assert (np.diff(mask[0, 35:45]) < 0).all()


# ---- MoLE Mix


@pytest.fixture
def pair(files: dict[str, str]) -> Callable[[Graph], list[Link]]:
    return lambda graph: [graph.load(files["flux_kohya"]), graph.load(files["flux_split"])]


def test_the_report_names_regions_and_steps(comfy: Server, files: dict[str, str]) -> None:
    """Rows of a list count one each; those that are off do not count."""
    graph = Graph()
    listed = rows(
        row(files["flux_kohya"]), row(files["flux_kohya_2"], on=False), row(files["flux_split"], start=0.1, end=0.455)
    )
    mix = graph.mix(graph.add("LegoMoLE_LoRAList", loras=listed), regions__region2=region(graph, width=0.25))
    text = report(comfy, graph, mix)
    assert "[1] flux_kohya: strength 1\n" in text
    assert "[2] flux_split: strength 1, in 25% of the picture, in steps 10 to 45.5%" in text


def test_more_masks_than_loras_are_refused(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    mask = region(graph)
    graph.picture(graph.mix(*pair(graph), regions__region1=mask, regions__region3=mask))
    error = comfy.fail(graph.nodes)
    assert "More regions are connected than LoRAs." in error
    assert "region3" in error


def named(graph: Graph, *regions: tuple[str, float]) -> Link:
    """A chain of regions: the LoRA of each, and the width of its box."""
    chain: dict[str, Link] = {}
    for name, width in regions:
        node, _ = region(graph, lora=name, width=width, **chain)
        chain = {"regions": [node, 1]}
    return chain["regions"]


def test_named_regions_follow_their_loras(comfy: Server, files: dict[str, str]) -> None:
    """The order of the rows and rows that are off change nothing; masks by number and files in subfolders work too."""
    graph = Graph()
    names = files["flux_kohya"], files["flux_kohya_2"], files["flux_split"]
    listed = rows(row(names[0], on=False), row(names[1]), row(names[2]))
    chain = named(graph, (names[2], 0.25), ("none", 1.0), (f"elsewhere/{names[0]}", 0.5))
    loras = graph.add("LegoMoLE_LoRAList", loras=listed)
    text = report(comfy, graph, graph.mix(loras, named_regions=chain, regions__region1=region(graph, width=0.75)))
    assert "[1] flux_kohya_2: strength 1, in 75% of the picture\n" in text
    assert "[2] flux_split: strength 1, in 25% of the picture\n" in text
    assert f"note: the region of elsewhere/{names[0]} is not used: that LoRA is not in this mix" in text


def test_a_named_region_equals_one_by_number(files: dict[str, str], sample: Callable, pair: Callable) -> None:
    graph, other = Graph(), Graph()
    by_name = graph.mix(*pair(graph), named_regions=named(graph, (files["flux_split"], 0.5)))
    by_number = other.mix(*pair(other), regions__region2=region(other))
    assert torch.equal(sample(graph, graph.picture(by_name))[1], sample(other, other.picture(by_number))[1])


@pytest.mark.parametrize("twice", ["by name", "by name and number"])
def test_a_lora_has_one_region(comfy: Server, files: dict[str, str], pair: Callable, twice: str) -> None:
    graph, name = Graph(), files["flux_split"]
    chain = named(graph, *[(name, 0.5)] * (2 if twice == "by name" else 1))
    more = {} if twice == "by name" else {"regions__region2": region(graph)}
    graph.picture(graph.mix(*pair(graph), named_regions=chain, **more))
    assert "flux_split has two regions." in comfy.fail(graph.nodes)


def test_a_region_of_a_file_that_is_missing_is_refused(comfy: Server) -> None:
    graph = Graph()
    region(graph, lora="never.safetensors")
    with pytest.raises(Refused, match=r"There is no such LoRA\."):
        comfy.queue(graph.nodes)


def test_regions_belong_to_their_lora_when_another_is_switched_off(
    files: dict[str, str], sample: Callable, pair: Callable
) -> None:
    graph, other = Graph(), Graph()
    mix = graph.mix(*pair(graph), regions__region2=region(graph), switched_off="1")
    alone = other.mix(pair(other)[1], regions__region1=region(other))
    assert torch.equal(sample(graph, graph.picture(mix))[1], sample(other, other.picture(alone))[1])


def test_a_mix_in_a_region_with_a_start_is_one_of_half_the_steps(files: dict[str, str], sample: Callable) -> None:
    """Of two steps: from the second on, as with the model of the mix in a second sampler."""
    latents = []
    for listed in (row(files["flux_kohya"], start=0.4), row(files["flux_kohya"], end=0.4), row(files["flux_kohya"])):
        graph = Graph()
        mix = graph.mix(graph.add("LegoMoLE_LoRAList", loras=rows(listed)), regions__region1=region(graph))
        latents.append(sample(graph, graph.picture(mix))[1])
    graph = Graph()
    latents.append(sample(graph, graph.picture())[1])
    for i, one in enumerate(latents):
        assert all(not torch.equal(one, other) for other in latents[:i])


def test_a_mix_sends_its_regions_to_the_page_while_it_samples(comfy: Server, pair: Callable) -> None:
    """Maps have the picture's aspect and name the node that samples; a LoRA that acts everywhere has none."""
    graph = Graph()
    mix = graph.mix(*pair(graph), regions__region2=region(graph, width=0.25))
    graph.picture(mix)
    chart = graph.add("LegoMoLE_GateMap", model=mix, after=["KSampler0", 0])
    run = comfy.run(graph.nodes | preview(chart, 1))
    assert run.outputs["text"]["text"][0].endswith("; regions: flux_split 25% of the picture")
    sent = [data for kind, data in comfy.messages if kind == "legomole.gates" and data["node"] == mix[0]]
    assert sent[-1]["sampler"] == "KSampler0"
    assert sent[-1]["labels"] == ["flux_kohya", "flux_split"]
    regions = sent[-1]["regions"]
    assert (regions["height"], regions["width"], regions["maps"][0]) == (32, 32, None)
    map_ = np.frombuffer(base64.b64decode(regions["maps"][1]), np.uint8).reshape(32, 32)
    assert (map_[:, :8] == 255).all()
    assert (map_[:, 8:] == 0).all()


def test_output_mixing_has_no_regions(comfy: Server, pair: Callable) -> None:
    graph = Graph()
    graph.picture(graph.mix(*pair(graph), regions__region1=region(graph), mixing="output"))
    assert "Output mixing mixes whole blocks in all steps, without regions." in comfy.fail(graph.nodes)


def test_a_mix_with_a_region_is_not_frozen(comfy: Server, pair: Callable) -> None:
    """The refusal comes before an image is sampled."""
    graph = Graph()
    mix = graph.mix(*pair(graph), regions__region1=region(graph))
    settings = {"method": "concat", "steps": 2, "seed": 1, "latent_image": graph.empty()}
    positive = graph.add("CLIPTextEncode", text="heart", clip=graph.clip)
    graph.save(graph.add("LegoMoLE_FreezeToLoRA", model=mix, positive=positive, **settings), "never")
    run = comfy.wait(comfy.queue(graph.nodes))
    assert "An ordinary LoRA acts everywhere and in all steps." in run.error
    assert not [data for data in run.of("progress") if data["node"] == "LegoMoLE_FreezeToLoRA0"]


def test_what_has_no_region_is_in_the_report(comfy: Server, files: dict[str, str]) -> None:
    """Replaced biases act everywhere; text encoder layers change the prompt."""
    state = load_file(comfy.loras / files["flux_kohya"])
    state["diffusion_model.img_in.diff_b"] = torch.full((128,), 0.01)
    save_file(state, comfy.loras / "with_bias.safetensors")
    for connected in ({}, {"regions__region1": True}):
        graph = Graph()
        masks = {name: region(graph) for name in connected}
        text = report(comfy, graph, graph.mix(graph.load("with_bias.safetensors"), **masks))
        assert ("with_bias: its biases, norms or replaced values have no gate" in text) == bool(connected)
    graph = Graph("sd15")
    loaded = graph.load(files["sd15_kohya"])
    text = report(comfy, graph, graph.mix(loaded, clip=graph.clip, regions__region1=region(graph)))
    assert "sd15_kohya: its text encoder layers change every prompt" in text


# ---- steps


@pytest.mark.parametrize("use", ["chain", "merge", "LEGO Merge", "Merge LoRAs", "Apply LoRA", "XY Compare"])
def test_merged_and_patched_loras_have_no_steps(comfy: Server, files: dict[str, str], use: str) -> None:
    graph = Graph()
    entries = rows(row(files["flux_kohya"]), row(files["flux_split"], end=0.4))
    if use in ("chain", "merge"):
        node, _ = graph.add("LegoMoLE_LoRAList", loras=entries, model=graph.model, clip=graph.clip, apply=use)
        graph.picture([node, 2])
    else:
        stack = graph.add("LegoMoLE_LoRAList", loras=entries)
        if use == "Apply LoRA":
            graph.picture(*graph.apply(stack))
        elif use == "XY Compare":
            graph.compare(stack, x_values="mole, concat")
        else:
            lora = graph.lego(stack) if use == "LEGO Merge" else graph.merge("concat", stack)
            graph.picture(*graph.apply(lora))
    error = comfy.fail(graph.nodes)
    assert "A LoRA with a start or an end step cannot be merged or patched in" in error
    assert "steps 0 to 40%" in error
    assert "flux_split" in error


def test_xy_compare_mixes_with_steps(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    stack = graph.add("LegoMoLE_LoRAList", loras=rows(row(files["flux_kohya"], end=0.4)))
    graph.compare(stack, x_values="none, mole")
    assert comfy.run(graph.nodes).outputs["LegoMoLE_XYCompare0"]["images"]


@pytest.mark.parametrize(("start", "end"), [(-0.1, 1), (0, 1.1), (0.5, 0.5), (0.6, 0.4), ("x", 1)])
def test_wrong_steps_are_refused(comfy: Server, files: dict[str, str], start: Any, end: Any) -> None:
    graph = Graph()
    listed = json.dumps([{"name": files["flux_kohya"], "start": start, "end": end}])
    graph.add("PreviewAny", source=graph.add("LegoMoLE_LoRAList", loras=listed))
    assert "This is not a list of LoRAs" in comfy.fail(graph.nodes)
