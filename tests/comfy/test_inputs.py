"""Inputs of the merge nodes: stacks, trained LoRAs, strengths, rules, other methods, other kinds of adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from .graph import Graph, Link
from .server import Prompt, Server

pytestmark = pytest.mark.comfy

OTHER_METHODS: dict[str, dict[str, Any]] = {
    "concat": {},
    "linear": {},
    "svd": {"rank": "4"},
    "ties": {"rank": "4", "density": 0.5, "sign_election": "total"},
    "dare": {"rank": "4", "density": 0.5, "seed": 0},
    "knots": {"rank": "4", "density": 0.5, "sign_election": "frequency"},
}


def same(a: tuple, b: tuple) -> None:
    """Assert that the latents of two images are equal up to rounding, relative to their size."""
    torch.testing.assert_close(a[1], b[1], rtol=0, atol=1e-3 * float(b[1].std()))


def merged_file(comfy: Server, graph: Graph, lora: list, prefix: str) -> dict[str, torch.Tensor]:
    """Save a merge and load the file."""
    graph.save(lora, prefix)
    comfy.run(graph.nodes)
    return load_file(comfy.loras / f"{prefix}_00001_.safetensors")


def test_full_rank_merge_gives_the_image_of_the_stock_chain(files: dict[str, str], sample: Callable) -> None:
    names, strengths = [files["flux_kohya"], files["flux_split"]], [0.6, -0.8]
    graph, stock = Graph(), Graph()
    loras = [graph.load(name, strength, strength) for name, strength in zip(names, strengths, strict=True)]
    merged = graph.lego(*loras, rank="12", parameter_reweight="off", output_reweight="off")
    same(
        sample(graph, graph.picture(*graph.apply(merged))),
        sample(stock, stock.picture(*stock.stock(*names, strengths=strengths))),
    )


def test_text_encoder_has_a_strength_of_its_own(files: dict[str, str], sample: Callable) -> None:
    """With model strength 0 only the conditioning changes, as with the stock loader."""
    graph, stock = Graph("sd15"), Graph("sd15")
    merged = graph.merge("concat", graph.load(files["sd15_kohya"], 0.0, 1.5))
    node = stock.add(
        "LoraLoader",
        model=stock.model,
        clip=stock.clip,
        lora_name=files["sd15_kohya"],
        strength_model=0.0,
        strength_clip=1.5,
    )[0]
    ours = sample(graph, graph.picture(*graph.apply(merged)))
    same(ours, sample(stock, stock.picture([node, 0], [node, 1])))
    plain = Graph("sd15")
    assert not torch.equal(ours[1], sample(plain, plain.picture())[1])


def test_stack_counts_as_its_entries(comfy: Server, files: dict[str, str]) -> None:
    """A stack of two LoRAs on one socket, compared with two sockets."""
    graph, separate = Graph(), Graph()
    first = graph.load(files["flux_kohya"], 0.5)
    second = graph.load(files["flux_split"], 0.25)
    graph.nodes[second[0]]["inputs"]["lora_stack"] = [first[0], 1]
    stacked = merged_file(comfy, graph, graph.lego([second[0], 1]), "stack/one")
    loras = [separate.load(files["flux_kohya"], 0.5), separate.load(files["flux_split"], 0.25)]
    single = merged_file(comfy, separate, separate.lego(*loras), "stack/two")
    assert set(stacked) == set(single)
    for key, tensor in stacked.items():
        torch.testing.assert_close(tensor, single[key], rtol=0, atol=0)


def test_convert_rank_stays_with_a_lora_in_a_stack(comfy: Server, files: dict[str, str]) -> None:
    saved: list[dict[str, torch.Tensor]] = []
    for output, prefix in ((0, "stack/socket"), (1, "stack/entry")):
        graph = Graph()
        node, _ = graph.load(files["loha"], convert_rank=4)
        saved.append(merged_file(comfy, graph, graph.lego([node, output]), prefix))
    assert all(torch.equal(tensor, saved[1][key]) for key, tensor in saved[0].items())


def test_any_lora_may_be_muted(comfy: Server, files: dict[str, str]) -> None:
    """The page then leaves out its socket, even the first one."""
    graph = Graph()
    merged = graph.lego(graph.load(files["flux_split"]), graph.load(files["flux_kohya"]))
    del graph.nodes[merged[0]]["inputs"]["loras.lora0"]
    assert comfy.run(graph.nodes | _preview(merged)).outputs["report"]["text"][0].startswith("lego: 1 LoRA,")


def test_node_shows_the_number_of_dropped_keys_first(comfy: Server, files: dict[str, str]) -> None:
    """A LoRA with text encoder modules, merged without CLIP."""
    graph = Graph("sd15")
    merged = graph.lego(graph.load(files["sd15_kohya"]))
    del graph.nodes[merged[0]]["inputs"]["clip"]
    outputs = comfy.run(graph.nodes | _preview(merged)).outputs
    assert outputs[merged[0]]["text"][0].startswith("3 keys could not be merged")
    assert "mlp_fc1.lora_up.weight of sd15_kohya: it belongs to a text encoder" in outputs["report"]["text"][0]


@pytest.mark.parametrize("method", ["lego", "concat"])
def test_nothing_connected_is_an_error(comfy: Server, method: str) -> None:
    graph = Graph()
    merged = graph.lego() if method == "lego" else graph.merge(method)
    assert "No LoRA is connected." in comfy.fail(graph.nodes | _preview(merged))


def _preview(merged: Link) -> Prompt:
    return {"report": {"class_type": "PreviewAny", "inputs": {"source": [merged[0], 1]}}}


def test_lora_trained_in_the_graph_can_be_merged(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    """Train LoRA's LORA_MODEL after two steps, merged with a file, compared with both on stock loaders."""
    graph = Graph()
    latent = graph.add("EmptySD3LatentImage", width=64, height=64, batch_size=1)
    trained = graph.add(
        "TrainLoraNode",
        model=graph.model,
        latents=latent,
        positive=graph.add("CLIPTextEncode", text="a house", clip=graph.clip),
        batch_size=1,
        grad_accumulation_steps=1,
        steps=2,
        learning_rate=0.01,
        rank=2,
        optimizer="SGD",
        loss_function="MSE",
        seed=0,
        training_dtype="fp32",
        lora_dtype="fp32",
        quantized_backward=False,
        algorithm="LoRA",
        gradient_checkpointing=True,
        checkpoint_depth=1,
        offloading=False,
        existing_lora="[None]",
        bucket_mode=False,
        bypass_mode=False,
    )
    merged = graph.merge("concat", graph.load(files["flux_kohya"]), trained)
    ours = graph.picture(*graph.apply(merged))
    chain, clip = graph.stock(files["flux_kohya"])
    both = graph.add("LoraModelLoader", model=chain, lora=trained, strength_model=1.0, bypass=False)
    stock = graph.picture(both, clip)
    run = comfy.run(graph.nodes)
    from .conftest import picture_of

    same(picture_of(comfy, run, ours), picture_of(comfy, run, stock))


@pytest.mark.parametrize("method", OTHER_METHODS)
def test_every_other_method_runs(comfy: Server, files: dict[str, str], method: str) -> None:
    graph = Graph()
    merged = graph.merge(
        method, graph.load(files["flux_kohya"]), graph.load(files["flux_kohya_2"]), **OTHER_METHODS[method]
    )
    state = merged_file(comfy, graph, merged, f"methods/{method}")
    rank = state["diffusion_model.double_blocks.0.img_mlp.0.lora_down.weight"].shape[0]
    assert rank == {"concat": 12, "linear": 8}.get(method, 4)


def test_node_offers_every_method_but_lego(comfy: Server) -> None:
    info = comfy.get("/object_info/LegoMoLE_MergeLoRAs")["LegoMoLE_MergeLoRAs"]
    options = info["input"]["required"]["method"][1]["options"]
    assert [option["key"] for option in options] == [*OTHER_METHODS, "calibrated", "ssr", "np"]


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_other_adapters_merge_when_converted(comfy: Server, files: dict[str, str], kind: str) -> None:
    graph = Graph()
    merged = graph.lego(graph.load(files["flux_kohya"]), graph.load(files[kind], convert_rank=16))
    graph.add("PreviewAny", source=[merged[0], 1])
    run = comfy.run(graph.nodes)
    assert "approximated at rank 16, which keeps" in run.outputs["PreviewAny0"]["text"][0]


def test_layer_weights_keep_a_lora_out(comfy: Server, files: dict[str, str]) -> None:
    """With these rules the merge of the single blocks is half of the first LoRA."""
    graph = Graph()
    merged = graph.merge("concat", graph.load(files["flux_kohya"]), graph.load(files["flux_kohya_2"]))
    graph.nodes[merged[0]]["inputs"]["module_weights"] = "2: *single_blocks* = 0  # style only\n\n1: * = 0.5"
    state = merged_file(comfy, graph, merged, "rules/one")
    name = "diffusion_model.single_blocks.0.linear2"
    delta = state[f"{name}.lora_up.weight"] @ state[f"{name}.lora_down.weight"]
    first = load_file(comfy.loras / files["flux_kohya"])
    name = "lora_unet_single_blocks_0_linear2"
    scale = 2 / 4  # alpha / rank
    expected = 0.5 * scale * first[f"{name}.lora_up.weight"] @ first[f"{name}.lora_down.weight"]
    torch.testing.assert_close(delta, expected)


def test_merging_a_merge(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    """The sum of a sum; one LoRA splits layers that another one fuses."""
    graph, stock = Graph(), Graph()
    inner = graph.merge("concat", graph.load(files["flux_kohya"]), graph.load(files["flux_split"]))
    outer = graph.merge("concat", inner, graph.load(files["flux_kohya_2"]))
    names = [files[name] for name in ("flux_kohya", "flux_split", "flux_kohya_2")]
    same(
        sample(graph, graph.picture(*graph.apply(outer))),
        sample(stock, stock.picture(*stock.stock(*names))),
    )


def test_loaded_lora_applies_and_saves_at_its_strength(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    """Load and Apply give the image of the stock loader; Load and Save write the strength into the file."""
    graph, stock, saved = Graph(), Graph(), Graph()
    lora = graph.load(files["flux_kohya"], 0.5, 0.5)
    graph.save(lora, "strength/half")
    ours = sample(graph, graph.picture(*graph.apply(lora, 2.0, 2.0)))
    same(ours, sample(stock, stock.picture(*stock.stock(files["flux_kohya"]))))
    name = "strength/half_00001_.safetensors"
    same(ours, sample(saved, saved.picture(*saved.stock(name, strengths=[2.0]))))


def test_report_and_metadata_describe_the_merge(comfy: Server, files: dict[str, str]) -> None:
    import hashlib
    import json

    from safetensors import safe_open

    graph = Graph()
    merged = graph.lego(graph.load(files["flux_kohya"], 0.7), graph.load(files["flux_split"]), rank="4", seed=3)
    graph.save(merged, "described/merged")
    graph.add("PreviewAny", source=[merged[0], 1])
    report = comfy.run(graph.nodes).outputs["PreviewAny0"]["text"][0]
    assert "[1] flux_kohya: weight 0.7" in report
    assert "DROPPED" not in report
    with safe_open(str(comfy.loras / "described/merged_00001_.safetensors"), "pt") as file:
        stored = json.loads(file.metadata()["legomole"])
    assert stored["recipe"]["method"] == "lego"
    assert stored["recipe"]["settings"]["seed"] == 3
    assert [entry["sha256"] for entry in stored["recipe"]["inputs"]] == [
        hashlib.sha256((comfy.loras / files[name]).read_bytes()).hexdigest() for name in ("flux_kohya", "flux_split")
    ]


def test_files_of_one_dialect_merge_without_a_model(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    """The layers keep their names, which another tool may need."""
    graph, stock = Graph(), Graph()
    names = [files["flux_kohya"], files["flux_kohya_2"]]
    merged = graph.merge("concat", *(graph.load(name) for name in names), with_model=False)
    graph.save(merged, "no_model/kohya")
    same(
        sample(graph, graph.picture(*graph.apply(merged))),
        sample(stock, stock.picture(*stock.stock(*names))),
    )
    state = load_file(comfy.loras / "no_model/kohya_00001_.safetensors")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight" in state


def test_files_of_two_dialects_need_no_model(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    """The tables of the family translate the names, without diffusers; the stock loader reads the result."""
    graph, ours, stock = Graph(), Graph(), Graph()
    loaded = [graph.load(files[name]) for name in ("flux_kohya", "flux_split")]
    graph.save(graph.merge("concat", *loaded, with_model=False), "no_model/mixed")
    comfy.run(graph.nodes)
    same(
        sample(ours, ours.picture(*ours.stock("no_model/mixed_00001_.safetensors"))),
        sample(stock, stock.picture(*stock.stock(files["flux_kohya"], files["flux_split"]))),
    )
