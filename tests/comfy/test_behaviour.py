"""The nodes as part of ComfyUI: caching, progress, cancelling, saving, errors."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import legomole
import pytest
import torch
from safetensors.torch import load_file

from . import loras
from .graph import Graph, Link
from .server import Server

pytestmark = pytest.mark.comfy

NODES = (
    "LegoMoLE_LoadLoRA",
    "LegoMoLE_LegoMerge",
    "LegoMoLE_MergeLoRAs",
    "LegoMoLE_LoRAReport",
    "LegoMoLE_ApplyLoRA",
    "LegoMoLE_SaveLoRA",
    "LegoMoLE_MoLEMix",
    "LegoMoLE_Region",
    "LegoMoLE_TrainGates",
    "LegoMoLE_SaveGates",
    "LegoMoLE_LoadGates",
    "LegoMoLE_FreezeToLoRA",
    "LegoMoLE_GateMap",
)


# ---- loading


def test_pack_loads_with_all_nodes_documented(comfy: Server) -> None:
    """Every node, input and output has a tooltip, and every node a help page."""
    for name in NODES:
        node = comfy.get(f"/object_info/{name}")[name]
        assert node["category"] == "LegoMoLE"
        assert node["description"]
        assert node["search_aliases"]
        assert all(node["output_tooltips"])
        for group in ("required", "optional"):
            for key, (_, options) in node["input"].get(group, {}).items():
                assert options.get("tooltip"), f"{name}.{key}"
        page = comfy.text(f"/extensions/legomole/docs/{name}.md")
        assert page.startswith("# "), name


# ---- caching


def test_nothing_runs_twice_until_the_file_changes(comfy: Server, files: dict[str, str]) -> None:
    path = comfy.loras / "cached.safetensors"
    loras.write(path, loras.kohya(loras.FLUX_FUSED, 2, 2.0, 30))
    graph = Graph()
    merged = graph.lego(graph.load("cached.safetensors"), graph.load(files["flux_split"]))
    graph.save(merged, "cache/merged")
    first = comfy.run(graph.nodes)
    assert {"LegoMoLE_LegoMerge0", "LegoMoLE_SaveLoRA0"} <= first.executed
    assert not comfy.run(graph.nodes).executed & {node for node in graph.nodes if "LegoMoLE" in node}
    assert len(list((comfy.loras / "cache").iterdir())) == 1

    loras.write(path, loras.kohya(loras.FLUX_FUSED, 2, 2.0, 31))
    os.utime(path, ns=(time.time_ns(), time.time_ns() + 10**9))  # a new time, whatever the resolution of the clock
    executed = comfy.run(graph.nodes).executed
    assert {"LegoMoLE_LoadLoRA0", "LegoMoLE_LegoMerge0", "LegoMoLE_SaveLoRA0"} <= executed
    assert "LegoMoLE_LoadLoRA1" not in executed
    one, two = (load_file(file) for file in sorted((comfy.loras / "cache").iterdir()))
    assert any(not torch.equal(one[key], two[key]) for key in one)


def test_cached_loras_give_the_same_values_as_new_ones(comfy: Server, files: dict[str, str]) -> None:
    """Rank and strength are changed one after the other, compared with copies of the files that were never loaded."""
    names = ("flux_kohya", "flux_split")
    for number, (rank, strength) in enumerate([("1x", 1.0), ("2", 1.0), ("2", -0.5), ("50%", -0.5)]):
        for kind in ("cached", "new"):
            graph = Graph()
            inputs = [files[name] for name in names]
            if kind == "new":
                inputs = [f"new{number}_{file}" for file in inputs]
                for name, copy in zip(names, inputs, strict=True):
                    shutil.copy(comfy.loras / files[name], comfy.loras / copy)
            graph.save(graph.lego(graph.load(inputs[0], strength), graph.load(inputs[1]), rank=rank), f"turned/{kind}")
            comfy.run(graph.nodes)
        cached, new = (load_file(max((comfy.loras / "turned").glob(f"{kind}_*"))) for kind in ("cached", "new"))
        assert cached.keys() == new.keys()
        assert all(torch.equal(cached[key], new[key]) for key in new)


# ---- progress and cancelling


@pytest.fixture(scope="module")
def slow(comfy: Server) -> Callable[[], tuple[Graph, Link]]:
    """A merge that takes some seconds: many layers of high rank, many starts."""
    shapes = {
        f"lora_unet_{place}_{layer}": shape
        for place in ("input_blocks_1_1", "input_blocks_2_1", "output_blocks_0_1", "output_blocks_1_1")
        for layer, shape in {
            "transformer_blocks_0_attn1_to_q": (320, 320),
            "transformer_blocks_0_attn2_to_k": (320, 768),
            "transformer_blocks_0_ff_net_0_proj": (2560, 320),
            "transformer_blocks_0_ff_net_2": (320, 1280),
        }.items()
    }
    names = [
        loras.write(comfy.loras / f"slow_{i}.safetensors", loras.kohya(shapes, 96, 96.0, 40 + i)) for i in range(2)
    ]

    def build() -> tuple[Graph, Link]:
        graph = Graph("sd15")
        return graph, graph.lego(*(graph.load(name) for name in names), rank="64", starts=100)

    return build


def test_progress_is_shown_and_cancelling_leaves_everything_usable(
    comfy: Server, files: dict[str, str], slow: Callable[[], tuple[Graph, Link]]
) -> None:
    graph, merged = slow()
    graph.save(merged, "cancelled/merged")
    prompt = comfy.queue(graph.nodes)
    comfy.wait_for("progress", lambda data: data["node"] == merged[0] and 0 < data["value"] < data["max"] == 16)
    comfy.post("/interrupt", {})
    run = comfy.wait(prompt)
    assert run.of("execution_interrupted")[0]["node_id"] == merged[0]
    assert not (comfy.loras / "cancelled").exists()

    after = Graph("sd15")
    after.save(after.lego(after.load(files["sd15_kohya"])), "cancelled/after")
    comfy.run(after.nodes)
    assert (comfy.loras / "cancelled" / "after_00001_.safetensors").exists()


# ---- saving


def test_saved_files_are_numbered_and_never_overwritten(comfy: Server, files: dict[str, str]) -> None:
    for settings in ("2", "3"):
        graph = Graph()
        path = graph.save(graph.lego(graph.load(files["flux_kohya"]), rank=settings), "numbered/%year%/merged")
        graph.add("PreviewAny", source=path)
        run = comfy.run(graph.nodes)
    folder = comfy.loras / "numbered" / time.strftime("%Y")
    assert sorted(file.name for file in folder.iterdir()) == ["merged_00001_.safetensors", "merged_00002_.safetensors"]
    expected = str(folder / "merged_00002_.safetensors")
    assert run.outputs["LegoMoLE_SaveLoRA0"]["text"] == [expected]
    assert run.outputs["PreviewAny0"]["text"] == [expected]
    assert "numbered/" in "".join(
        comfy.get("/object_info/LoraLoader")["LoraLoader"]["input"]["required"]["lora_name"][0]
    )


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_saved_dtype(comfy: Server, files: dict[str, str], dtype: str) -> None:
    graph = Graph()
    graph.save(graph.lego(graph.load(files["flux_kohya"])), f"dtype/{dtype}", dtype=dtype)
    comfy.run(graph.nodes)
    state = load_file(comfy.loras / f"dtype/{dtype}_00001_.safetensors")
    assert {tensor.dtype for key, tensor in state.items() if not key.endswith("alpha")} == {getattr(torch, dtype)}


@pytest.mark.parametrize("format", ["kohya", "diffusers", "comfy"])
@pytest.mark.parametrize("base", ["flux", "sd15"])
def test_a_merge_with_the_model_is_saved_for_every_program(
    comfy: Server, files: dict[str, str], format: str, base: str
) -> None:
    """The layers are renamed, split and fused as the program names them, and the updates stay the same."""
    names = {"flux": ("flux_kohya", "flux_split"), "sd15": ("sd15_kohya", "sd15_diffusers")}[base]
    graph = Graph(base)
    merged = graph.merge("concat", *(graph.load(files[name]) for name in names))
    for chosen in ("comfy", format):
        graph.save(merged, f"format/{base}_{chosen}", format=chosen)
    comfy.run(graph.nodes)
    paths = [max((comfy.loras / "format").glob(f"{base}_{chosen}_*")) for chosen in ("comfy", format)]
    expected, saved = map(legomole.load, paths)
    prefixes = {"kohya": "lora_", "diffusers": ("transformer.", "unet.", "text_encoder."), "comfy": ""}
    assert all(name.startswith(prefixes[format]) for name in saved.layers)
    one, two = legomole.align([expected, saved])
    assert set(one.modules) == set(two.modules)
    for name, part in one.modules.items():
        torch.testing.assert_close(part.delta(), two.modules[name].delta(), rtol=0, atol=1e-5)


def test_format_that_has_no_names_for_some_layers_is_refused(comfy: Server, files: dict[str, str]) -> None:
    state = {**loras.kohya(loras.FLUX_FUSED, 2, 2.0, 57), **loras.kohya({"lora_unet_img_in": (128, 64)}, 2, 2.0, 58)}
    state = {key.replace("img_in", "unheard_of"): tensor for key, tensor in state.items()}
    loras.write(comfy.loras / "unheard_of.safetensors", state)
    graph = Graph()
    lora = graph.merge("concat", graph.load("unheard_of.safetensors"), with_model=False)
    graph.save(lora, "no_names/diffusers", format="diffusers")
    assert "diffusers has no names for some layers of this LoRA" in comfy.fail(graph.nodes)
    assert not list((comfy.loras / "no_names").iterdir())


@pytest.mark.parametrize("prefix", ["../escaped", "/tmp/escaped", "a/../../escaped", "C:\\escaped", "link/escaped", ""])
def test_nothing_is_written_outside_the_loras_folder(
    comfy: Server, files: dict[str, str], tmp_path: Path, prefix: str
) -> None:
    link = comfy.loras / "link"
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path, target_is_directory=True)
    graph = Graph()
    graph.save(graph.lego(graph.load(files["flux_kohya"])), prefix)
    try:
        assert "A LoRA can only be saved inside the loras folder." in comfy.fail(graph.nodes)
    finally:
        link.unlink()
    assert not list(tmp_path.iterdir())
    assert not list(comfy.base.rglob("*escaped*"))


def test_unwritable_folder_is_reported(comfy: Server, files: dict[str, str]) -> None:
    """A file in place of the folder, because root may write to any folder."""
    (comfy.loras / "occupied").write_bytes(b"")
    graph = Graph()
    graph.save(graph.lego(graph.load(files["flux_kohya"])), "occupied/merged")
    assert "The folder cannot be made." in comfy.fail(graph.nodes)
    (comfy.loras / "occupied").unlink()


# ---- bad input


def _truncated(path: Path) -> None:
    loras.write(path, loras.kohya(loras.FLUX_FUSED, 2, 2.0, 50))
    path.write_bytes(path.read_bytes()[:-1000])


def _with_nan(path: Path) -> None:
    state = loras.kohya(loras.FLUX_FUSED, 2, 2.0, 51)
    state["lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"][3, 1] = float("nan")
    loras.write(path, state)


def _mismatched(path: Path) -> None:
    state = loras.kohya(loras.FLUX_FUSED, 2, 2.0, 52)
    name = "lora_unet_double_blocks_0_img_mlp_0.lora_up.weight"
    loras.write(path, {**state, name: torch.zeros(512, 3)})


def _without_down(path: Path) -> None:
    state = loras.kohya(loras.FLUX_FUSED, 2, 2.0, 55)
    del state["lora_unet_double_blocks_0_img_mlp_0.lora_down.weight"]
    loras.write(path, state)


def _of_another_shape(path: Path) -> None:
    loras.write(path, loras.kohya({"lora_unet_double_blocks_0_img_mlp_0": (1024, 256)}, 2, 2.0, 53))


BAD_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "truncated.safetensors": (_truncated, "The file is cut off"),
    "text.safetensors": (lambda path: path.write_text("not a LoRA at all"), "not a safetensors file"),
    "empty.safetensors": (lambda path: path.write_bytes(b""), "The file is empty."),
    "pickle.pt": (lambda path: torch.save({"a": torch.zeros(1)}, path), "pickle"),
    "nan.safetensors": (_with_nan, "NaN or infinite"),
    "mismatched.safetensors": (_mismatched, "do not fit together"),
    "alone.safetensors": (_without_down, "a tensor is missing"),
    "misfit.safetensors": (_of_another_shape, "made for another base model"),
    "other_base.safetensors": (
        lambda path: loras.write(path, loras.kohya(loras.SD15_KOHYA, 2, 2.0, 54)),
        "ComfyUI finds nothing in this LoRA",
    ),
    "unknown.safetensors": (lambda path: loras.write(path, {"a.b": torch.zeros(2)}), "ComfyUI finds nothing"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_file_has_its_own_error(comfy: Server, files: dict[str, str], name: str) -> None:
    write, message = BAD_FILES[name]
    path = comfy.loras / name
    write(path)
    graph = Graph()
    graph.save(graph.lego(graph.load(files["flux_kohya"]), graph.load(name)), "bad/merged")
    try:
        error = comfy.fail(graph.nodes)
    finally:
        path.unlink()
    assert message in error
    assert name in error
    assert not (comfy.loras / "bad").exists()


@pytest.mark.parametrize("put_on", ["apply", "mix"])
def test_nan_is_refused(comfy: Server, put_on: str) -> None:
    """The stock loader would give a black image or noise."""
    path = comfy.loras / f"broken_{put_on}.safetensors"
    _with_nan(path)
    graph = Graph()
    broken = graph.load(path.name)
    graph.picture(graph.mix(broken) if put_on == "mix" else graph.apply(broken)[0])
    try:
        error = comfy.fail(graph.nodes)
    finally:
        path.unlink()
    assert "The file contains NaN or infinite numbers." in error
    assert path.name in error
    assert "double_blocks" in error


def test_strength_that_is_not_finite_is_refused(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph()
    graph.picture(graph.apply(graph.load(files["flux_kohya"], float("nan")))[0])
    assert "A strength is not a finite number." in comfy.fail(graph.nodes)


BAD_SETTINGS = {
    "rank 0": ({"rank": "0"}, 1.0, "This is not a rank."),
    "rank text": ({"rank": "many"}, 1.0, "This is not a rank."),
    "strength nan": ({}, float("nan"), "not a finite number"),
    "all strengths 0": ({}, 0.0, "every weight is 0"),
    "rule": ({"module_weights": "attn2"}, 1.0, "not a rule for layer weights"),
    "rule for a missing LoRA": ({"module_weights": "3: * = 1"}, 1.0, "is for a LoRA that does not exist"),
    "rule that matches nothing": ({"module_weights": "*attn9* = 1"}, 1.0, "matches nothing"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_setting_has_its_own_error(comfy: Server, files: dict[str, str], case: str) -> None:
    settings, strength, message = BAD_SETTINGS[case]
    graph = Graph()
    loaded = [graph.load(files[name], strength, strength) for name in ("flux_kohya", "flux_kohya_2")]
    graph.save(graph.lego(*loaded, **settings), "bad/merged")
    assert message in comfy.fail(graph.nodes)


@pytest.mark.parametrize("kind", ["loha", "lokr", "dora"])
def test_other_adapters_are_refused_without_convert_rank(comfy: Server, files: dict[str, str], kind: str) -> None:
    graph = Graph()
    graph.save(graph.lego(graph.load(files["flux_kohya"]), graph.load(files[kind])), "bad/merged")
    error = comfy.fail(graph.nodes)
    assert "not low rank" in error
    assert "set convert_rank on Load LoRA" in error
    assert "diffusion_model.double_blocks.0.img_" in error


def test_update_that_comfyui_cannot_compute_is_reported(comfy: Server, files: dict[str, str]) -> None:
    """BOFT without alpha: the stock loader logs an error and skips the layer."""
    state = loras.oft({"lora_unet_double_blocks_0_img_mlp_0": (512, 128)}, (2, 64), 56)
    rotations = {key: tensor for key, tensor in state.items() if not key.endswith("alpha")}
    loras.write(comfy.loras / "no_alpha.safetensors", rotations)
    graph = Graph()
    graph.save(graph.lego(graph.load("no_alpha.safetensors", convert_rank=16)), "bad/merged")
    assert "ComfyUI computes no change from its BOFT" in comfy.fail(graph.nodes)


def test_lora_that_fits_nothing_cannot_be_applied(comfy: Server, files: dict[str, str]) -> None:
    graph = Graph("sd15")
    graph.picture(*graph.apply(graph.load(files["flux_kohya"])))
    assert "Nothing of the LoRA fits the model." in comfy.fail(graph.nodes)


def test_lora_with_names_of_other_hosts_is_applied(files: dict[str, str], sample: Callable) -> None:
    """diffusers' U-Net names, which the stock loader does not read, compared with names that it reads."""
    graph, stock = Graph("sd15"), Graph("sd15")
    ours = sample(graph, graph.picture(*graph.apply(graph.load(files["sd15_diffusers"]))))
    theirs = sample(stock, stock.picture(*stock.stock(files["sd15_respelled"])))
    torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=0)
