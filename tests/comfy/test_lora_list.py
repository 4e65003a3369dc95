"""LoRA List, and the page's requests to the server."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from typing import Any
from urllib.error import HTTPError
from urllib.parse import quote

import pytest
import torch
from safetensors.torch import load_file, save_file

from .graph import Graph
from .server import Server

pytestmark = pytest.mark.comfy

THUMBNAIL = "data:image/png;base64,iVBORw0KGgo="


def rows(*entries: dict[str, Any]) -> str:
    return json.dumps(entries)


def row(name: str, strength: float = 1.0, on: bool = True, **more: Any) -> dict[str, Any]:
    return {"name": name, "on": on, "strength": strength, **more}


def test_list_gives_the_same_image_as_single_loaders(files: dict[str, str], sample: Callable) -> None:
    """The LoRAs that are on, in order and at their strengths, after the incoming stack; bit for bit."""
    a, b, c = files["flux_kohya"], files["flux_split"], files["flux_kohya_2"]
    graph, other = Graph(), Graph()
    first = graph.add("LegoMoLE_LoRAList", loras=rows(row(a, 0.5), row(c, on=False)))
    stack = graph.add("LegoMoLE_LoRAList", loras=rows(row(b, -0.7)), lora_stack=first)
    loaded = [other.load(a, 0.5, 0.5), other.load(b, -0.7, -0.7)]
    from_list = sample(graph, graph.picture(*graph.apply(graph.merge("concat", stack))))
    expected = sample(other, other.picture(*other.apply(other.merge("concat", *loaded))))
    assert torch.equal(from_list[1], expected[1])


@pytest.mark.parametrize("way", ["chain", "mix", "merge"])
def test_list_is_a_loader(comfy: Server, files: dict[str, str], sample: Callable, way: str) -> None:
    """With a model it gives the image of stock loaders, of MoLE Mix, or of LEGO Merge, with the same LoRAs; exactly."""
    a, b, c = files["flux_kohya"], files["flux_split"], files["flux_kohya_2"]
    graph, other = Graph(), Graph()
    node, _ = graph.add(
        "LegoMoLE_LoRAList",
        loras=rows({**row(b, -0.7), "clip": 0.4}, row(c, on=False)),
        lora_stack=graph.add("LegoMoLE_LoRAList", loras=rows(row(a, 0.5))),
        model=graph.model,
        clip=graph.clip,
        apply=way,
    )
    if way == "chain":
        model, clip = other.stock(a, strengths=[0.5])
        loader, _ = other.add("LoraLoader", model=model, clip=clip, lora_name=b, strength_model=-0.7, strength_clip=0.4)
        model, clip = [loader, 0], [loader, 1]
    elif way == "mix":
        mix, _ = other.mix(other.load(a, 0.5, 0.5), other.load(b, -0.7, 0.4), clip=other.clip)
        model, clip = [mix, 0], [mix, 1]
    else:
        inputs = comfy.get("/object_info/LegoMoLE_LegoMerge")["LegoMoLE_LegoMerge"]["input"]["required"]
        defaults = {name: options["default"] for name, (_, options) in inputs.items() if "default" in options}
        model, clip = other.apply(other.lego(other.load(a, 0.5, 0.5), other.load(b, -0.7, 0.4), **defaults))
    from_list = sample(graph, graph.picture([node, 2], [node, 3]))
    expected = sample(other, other.picture(model, clip))
    assert torch.equal(from_list[1], expected[1])


def test_list_without_loras_passes_the_model_through(files: dict[str, str], sample: Callable) -> None:
    graph, plain = Graph(), Graph()
    node, _ = graph.add(
        "LegoMoLE_LoRAList", loras=rows(row(files["flux_kohya"], on=False)), model=graph.model, clip=graph.clip
    )
    latent = sample(graph, graph.picture([node, 2], [node, 3]))[1]
    assert torch.equal(latent, sample(plain, plain.picture(plain.model, plain.clip))[1])


def test_trigger_words_one_line_per_lora(comfy: Server, files: dict[str, str]) -> None:
    tensors = load_file(comfy.loras / files["flux_kohya"])
    for name, phrase in (("with_words", "ember style, burning"), ("without", "")):
        save_file(tensors, comfy.loras / f"{name}.safetensors", {"modelspec.trigger_phrase": phrase})
    graph = Graph()
    listed = [row("without.safetensors"), row("with_words.safetensors"), row("with_words.safetensors", words="a, b")]
    node, _ = graph.add("LegoMoLE_LoRAList", loras=rows(*listed))
    graph.add("PreviewAny", source=[node, 1])
    shown = comfy.run(graph.nodes).outputs["PreviewAny0"]["text"]
    assert shown == ["\nember style, burning\na, b"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "This is not a list of LoRAs"),
        ('[{"on": true}]', "loras 0.name"),
        ('[{"name": "a", "strength": 1e400}]', "loras 0.strength"),
        ('[{"name": "a", "strength": 101}]', "loras 0.strength"),
        ('[{"name": "a", "clip": "x"}]', "loras 0.clip"),
        ('[{"name": "../../x.safetensors"}]', "There is no such LoRA"),
        ('[{"name": "gone.safetensors"}]', "gone.safetensors"),
    ],
)
def test_wrong_lists_are_refused(comfy: Server, text: str, words: str) -> None:
    graph = Graph()
    graph.add("PreviewAny", source=graph.add("LegoMoLE_LoRAList", loras=text))
    assert words in comfy.fail(graph.nodes)


def test_node_runs_again_when_a_file_changes(comfy: Server, files: dict[str, str]) -> None:
    file = comfy.loras / "changing.safetensors"
    tensors = load_file(comfy.loras / files["flux_kohya"])
    save_file(tensors, file, {"modelspec.trigger_phrase": "one"})
    graph = Graph()
    node, _ = graph.add("LegoMoLE_LoRAList", loras=rows(row(file.name)))
    graph.add("PreviewAny", source=[node, 1])
    assert comfy.run(graph.nodes).outputs["PreviewAny0"]["text"] == ["one"]
    assert node not in comfy.run(graph.nodes).executed
    save_file(tensors, file, {"modelspec.trigger_phrase": "another"})
    assert comfy.run(graph.nodes).outputs["PreviewAny0"]["text"] == ["another"]


def test_page_gets_names_and_descriptions_of_files(comfy: Server, files: dict[str, str]) -> None:
    assert files["flux_kohya"] in comfy.get("/legomole/loras")
    file = comfy.loras / "described.safetensors"
    metadata = {"modelspec.thumbnail": THUMBNAIL, "ss_base_model_version": "flux1"}
    metadata["modelspec.trigger_phrase"] = "<b>x</b>"
    save_file({"a": torch.zeros(1)}, file, metadata)
    assert comfy.get("/legomole/lora?name=described.safetensors") == {
        "title": "", "base": "flux1", "words": ["<b>x</b>"], "thumbnail": THUMBNAIL,
    }  # fmt: skip
    file.write_bytes(b"broken")  # the description is not cached for a changed file
    assert "described.safetensors" in comfy.get("/legomole/lora?name=described.safetensors")["error"]
    for name in ("gone.safetensors", "../checkpoints/sd15_nano.safetensors", "/etc/passwd", ""):
        assert "There is no such LoRA" in comfy.get(f"/legomole/lora?name={quote(name)}")["error"]


def test_page_gets_what_lies_beside_a_file(comfy: Server) -> None:
    """A preview and descriptions, but no other files."""
    file = comfy.loras / "beside.safetensors"
    save_file({"a": torch.zeros(1)}, file, {"ot_revision": "1", "ss_tag_frequency": '{"a": {"fire": 3, "night": 5}}'})
    details = comfy.get(f"/legomole/lora/details?name={file.name}")
    assert (details["trainer"], details["tags"], details["preview"]) == ("OneTrainer", ["night", "fire"], False)
    assert details["bytes"] == file.stat().st_size
    hashed = comfy.get(f"/legomole/lora/hash?name={file.name}")
    assert hashed == {"sha256": hashlib.sha256(file.read_bytes()).hexdigest()}
    preview = f"/legomole/lora/preview?name={file.name}"
    with pytest.raises(HTTPError, match="404") as error:
        comfy.text(preview)
    error.value.close()
    file.with_name("beside.preview.png").write_text("a picture")
    described = {"model_name": "Beside", "base_model": "Pony", "civitai": {"trainedWords": ["moon, night"]}}
    file.with_name("beside.metadata.json").write_text(json.dumps(described))
    assert comfy.text(preview) == "a picture"
    details = comfy.get(f"/legomole/lora/details?name={file.name}")
    assert [details[key] for key in ("title", "base", "words", "preview")] == [
        "Beside",
        "Pony",
        ["moon", "night"],
        True,
    ]
    assert comfy.get(f"/legomole/lora?name={file.name}")["words"] == ["moon", "night"]
    graph = Graph()
    node, _ = graph.add("LegoMoLE_LoRAList", loras=rows(row(file.name)))
    graph.add("PreviewAny", source=[node, 1])
    assert comfy.run(graph.nodes).outputs["PreviewAny0"]["text"] == ["moon, night"]
    for kind in ("details", "hash"):
        assert "There is no such LoRA" in comfy.get(f"/legomole/lora/{kind}?name=../x.safetensors")["error"]


def test_mix_sends_its_gates_to_the_page_while_it_samples(comfy: Server, files: dict[str, str]) -> None:
    """The messages have the node, the LoRAs, the scopes and their gates."""
    graph = Graph()
    mix = graph.mix(graph.load(files["flux_kohya"], 0.5), graph.load(files["flux_split"]), granularity="block")
    graph.picture(mix)
    run = comfy.run(graph.nodes)
    labels = ["flux_kohya", "flux_split"]
    assert run.outputs[mix[0]]["experts"] == labels
    sent = [data for kind, data in comfy.messages if kind == "legomole.gates" and data["node"] == mix[0]]
    assert sent
    assert sent[-1]["labels"] == labels
    assert len(sent[-1]["scopes"]) == len(sent[-1]["gates"]) > 1
    assert all(row == [1.0, 1.0] for row in sent[-1]["gates"])  # even gates: every LoRA at its own strength


def test_a_stack_is_applied_one_after_the_other(comfy: Server, files: dict[str, str], sample: Callable) -> None:
    graph = Graph()
    listed = rows(row(files["flux_kohya"], 0.8), row(files["flux_split"], on=False), row(files["flux_kohya_2"]))
    model, clip = graph.apply(graph.add("LegoMoLE_LoRAList", loras=listed))
    graph.add("PreviewAny", source=[model[0], 2])
    _, ours = sample(graph, graph.picture(model, clip))
    plain = Graph()
    names = files["flux_kohya"], files["flux_kohya_2"]
    _, stock = sample(plain, plain.picture(*plain.stock(*names, strengths=[0.8, 1.0])))
    assert torch.equal(ours, stock)
