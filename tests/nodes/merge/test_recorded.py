"""A merge without a model against the command line's repetition of the saved file: the same bytes."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole.cli import app
from legomole.core.formats import load
from legomole.core.merge.methods import METHODS
from legomole.core.merge.statistics import Statistics
from legomole.core.recipes.metadata import KEY
from legomole.core.recipes.method_settings import build_method
from legomole.core.recipes.read import read_recipe
from legomole.core.recipes.recipe import RecipeError
from legomole.core.recipes.run import run
from legomole.nodes.graph_lora import GraphLora
from legomole.nodes.loaded_loras import adapter_of, read_files
from legomole.nodes.merge.recorded import Remedies, merge_loaded, save_lora
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

KOHYA = [f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn{i}_to_{x}" for i in (1, 2) for x in "qk"]
DIFFUSERS = [f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn{i}.to_{x}" for i in (1, 2) for x in "qk"]
TEXT_ENCODER = "lora_te_text_model_encoder_layers_0_mlp_fc1"


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def factors(names: list[str], rank: int, seed: int, suffixes: tuple[str, str]) -> dict[str, Tensor]:
    state: dict[str, Tensor] = {}
    for i, name in enumerate(names):
        state[f"{name}.{suffixes[0]}.weight"] = random(rank, 6, seed=seed + 2 * i)
        state[f"{name}.{suffixes[1]}.weight"] = random(5, rank, seed=seed + 2 * i + 1)
    return state


def kohya(rank: int, seed: int, names: list[str] = KOHYA) -> dict[str, Tensor]:
    alphas = {f"{name}.alpha": torch.tensor(2.0) for name in names}
    return factors(names, rank, seed, ("lora_down", "lora_up")) | alphas


def loha(seed: int, names: list[str] = KOHYA) -> dict[str, Tensor]:
    shapes = {"w1_a": (5, 3), "w1_b": (3, 6), "w2_a": (5, 3), "w2_b": (3, 6)}
    return {
        f"{name}.hada_{part}": random(*shape, seed=seed + 10 * i + j)
        for i, name in enumerate(names)
        for j, (part, shape) in enumerate(shapes.items())
    }


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., GraphLora]:
    def run(name: str, state: dict[str, Tensor], dtype: torch.dtype = torch.float32, **settings: Any) -> GraphLora:
        metadata = settings.pop("metadata", None)
        path = tmp_path / f"{name}.safetensors"
        save_file({key: tensor.to(dtype) for key, tensor in state.items()}, path, metadata=metadata)
        return GraphLora(path, name, **settings)

    return run


@pytest.fixture
def repeats(tmp_path: Path) -> Callable[[Path], None]:
    """Asserts that ``legomole merge --config`` makes the same bytes of a saved file."""

    def run(saved: Path) -> None:
        again = tmp_path / "again.safetensors"
        result = CliRunner().invoke(app, ["merge", "--config", str(saved), "-o", str(again), "--overwrite"])
        assert result.exit_code == 0, result.output
        assert information(again) == information(saved)
        assert again.read_bytes() == saved.read_bytes()

    return run


def information(path: Path) -> dict[str, Any]:
    """The metadata, with the recipe and the report as data: comparing these says what differs, where bytes do not."""
    with safe_open(str(path), "pt") as file:
        metadata = dict(file.metadata())
    return {**metadata, KEY: json.loads(metadata[KEY])}


def merge(loras: list[GraphLora], method: str = "lego", rules: str = "", **settings: Any) -> GraphLora:
    needs = {"rank": "1x"} if "rank" in METHODS[method].__dataclass_fields__ else {}
    return merge_loaded(loras, read_files(loras), build_method(method, {**needs, **settings}), rules)[0]


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"calibrated", "ssr"}))
def test_every_method(write, repeats, tmp_path, method) -> None:
    loras = [write("a", kohya(4, 0), strength_model=0.7), write("b", kohya(2, 100), strength_model=-1.3)]
    repeats(save_lora(merge(loras, method), tmp_path / "merged.safetensors"))


def test_text_encoder_strengths_and_layer_rules(write, repeats, tmp_path) -> None:
    """Factors whose product depends on their order in the last digit."""
    names = [*KOHYA, TEXT_ENCODER]
    loras = [
        write("a", kohya(4, 0, names), strength_model=0.7, strength_clip=0.3),
        write("b", kohya(2, 100, names), strength_clip=0.0),
    ]
    rules = "1: lora_* = 0.1\n*attn1* = 0.7\n1: *to_q = 0.3\n1: *attn1* = 1.1"
    repeats(save_lora(merge(loras, "concat", rules), tmp_path / "merged.safetensors"))


@pytest.mark.parametrize(
    ("names", "suffixes", "format"),
    [
        (KOHYA, ("lora_down", "lora_up"), "kohya"),
        (DIFFUSERS, ("lora_A", "lora_B"), "diffusers"),
        ([f"base_model.model.{name}" for name in DIFFUSERS], ("lora_A", "lora_B"), "diffusers"),
        (["diffusion_model.blocks.0.attn.q", "diffusion_model.blocks.0.attn.k"], ("lora_A", "lora_B"), "comfy"),
    ],
)
def test_every_dialect_keeps_its_names_and_format(write, repeats, tmp_path, names, suffixes, format) -> None:
    loras = [write("a", factors(names, 4, 0, suffixes)), write("b", factors(names, 2, 100, suffixes))]
    saved = save_lora(merge(loras), tmp_path / "merged.safetensors")
    repeats(saved)
    assert information(saved)[KEY]["recipe"]["format"] == format
    assert load(saved).layers == sorted(name.removeprefix("base_model.model.") for name in names)


def test_two_dialects_meet_under_diffusers_names(write, repeats, tmp_path) -> None:
    pytest.importorskip("diffusers")
    carried = {"some.embedding": torch.ones(3)}
    loras = [write("a", kohya(4, 0) | carried), write("b", factors(DIFFUSERS, 2, 100, ("lora_A", "lora_B")))]
    saved = save_lora(merge(loras), tmp_path / "merged.safetensors")
    repeats(saved)
    assert any("passed on" in note for note in information(saved)[KEY]["report"]["notes"])


def test_names_without_a_prefix_are_replaced_by_those_that_all_programs_read(write, repeats, tmp_path) -> None:
    bare = [name.removeprefix("unet.") for name in DIFFUSERS]
    loras = [write(x, factors(bare, 2, i, ("lora_A", "lora_B"))) for i, x in enumerate("ab")]
    saved = save_lora(merge(loras), tmp_path / "merged.safetensors")
    repeats(saved)
    assert load(saved).layers == sorted(KOHYA)


def test_contradicting_metadata(write, repeats, tmp_path) -> None:
    loras = [
        write("a", kohya(4, 0), metadata={"ss_base_model_version": "sd_v1", "modelspec.trigger_phrase": "ember"}),
        write("b", kohya(2, 100), metadata={"ss_base_model_version": "sdxl", "modelspec.trigger_phrase": "heart"}),
    ]
    saved = save_lora(merge(loras), tmp_path / "merged.safetensors")
    repeats(saved)
    assert information(saved)["modelspec.trigger_phrase"] == "ember, heart"
    assert any("ss_base_model_version differs" in note for note in information(saved)[KEY]["report"]["notes"])


def test_every_lora_has_its_own_convert_rank(write, repeats, tmp_path) -> None:
    loras = [write("a", loha(0), convert_rank=2), write("b", kohya(2, 100)), write("c", loha(50), convert_rank=4)]
    saved = save_lora(merge(loras, "concat"), tmp_path / "merged.safetensors")
    repeats(saved)
    assert {part.rank for part in load(saved).modules.values()} == {8}
    again = tmp_path / "three.safetensors"
    arguments = ["merge", "--config", str(saved), "--convert-rank", "3", "-o", str(again)]
    assert CliRunner().invoke(app, arguments).exit_code == 0
    assert {part.rank for part in load(again).modules.values()} == {8}  # 3 + 2 + 3
    assert [entry.convert_rank for entry in read_recipe(again).inputs] == [None] * 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
@pytest.mark.parametrize("inputs", [torch.float16, torch.float32])
def test_every_dtype(write, repeats, tmp_path, dtype, inputs) -> None:
    """Also one wider than the LoRAs', and with a change of a norm beside the factors."""
    loras = [
        write("a", kohya(4, 0) | {"lora_unet_norm.diff": random(6, seed=7)}, inputs),
        write("b", kohya(2, 100), inputs),
    ]
    saved = save_lora(merge(loras), tmp_path / "merged.safetensors", dtype=dtype)
    repeats(saved)
    assert str(load(saved).dtype) == f"torch.{dtype}"


def test_a_chosen_format(write, repeats, tmp_path) -> None:
    loras = [write("a", kohya(4, 0)), write("b", kohya(2, 100))]
    saved = save_lora(merge(loras), tmp_path / "merged.safetensors", format="comfy", dtype="bfloat16")
    repeats(saved)
    assert information(saved)[KEY]["recipe"]["format"] == "comfy"


def test_a_rank_above_the_pool_is_lowered_in_the_recipe_too(write, repeats, tmp_path) -> None:
    loras = [write("a", kohya(2, 1)), write("b", kohya(3, 2), strength_model=0.0, strength_clip=0.0)]
    method = build_method("lego", {"rank": 4})
    lora, report = merge_loaded(loras, read_files(loras), method)
    assert report.ranks_out == (2, 2)
    assert "rank 4 is more than the LoRAs' ranks together: merged at rank 2, the highest possible" in report.notes
    saved = save_lora(lora, tmp_path / "saved.safetensors")
    assert read_recipe(saved).settings["rank"] == 2
    repeats(saved)


@pytest.mark.parametrize("format", ["diffusers", "comfy", "kohya"])
def test_the_layers_are_named_for_the_chosen_format(write, repeats, tmp_path, format) -> None:
    merged = merge([write("a", kohya(2, 1)), write("b", kohya(3, 2))], rank=3)
    saved = save_lora(merged, tmp_path / "saved.safetensors", format)
    prefix = {"diffusers": "unet.down_blocks.0."}.get(format, "lora_unet_down_blocks_0_")
    assert all(name.startswith(prefix) for name in load(saved).modules)
    repeats(saved)


def test_what_was_merged_can_be_saved_twice_and_in_two_ways(write, repeats, tmp_path) -> None:
    merged = merge([write("a", kohya(4, 0)), write("b", kohya(2, 100))])
    for number, dtype in enumerate((None, "float16", None)):
        repeats(save_lora(merged, tmp_path / f"{number}.safetensors", dtype=dtype))
    assert (tmp_path / "0.safetensors").read_bytes() == (tmp_path / "2.safetensors").read_bytes()


def test_a_file_that_changed_since_the_merge_is_not_merged_again(write, tmp_path) -> None:
    merged = merge([write("a", kohya(4, 0)), write("b", kohya(2, 100))])
    write("b", kohya(2, 200))
    with pytest.raises(RecipeError, match="not the file this recipe was written for"):
        save_lora(merged, tmp_path / "merged.safetensors", dtype="float16")


def test_a_file_saved_at_another_strength_is_a_merge_of_one(write, repeats, tmp_path) -> None:
    """And the recipe of the file that was loaded, which no longer fits, is not passed on."""
    inner = save_lora(merge([write("a", kohya(4, 0)), write("b", kohya(2, 100))]), tmp_path / "inner.safetensors")
    half = save_lora(GraphLora(inner, "inner", 0.5, 0.5), tmp_path / "half.safetensors")
    repeats(half)
    recipe = read_recipe(half)
    assert (recipe.method, [(entry.path, entry.weight) for entry in recipe.inputs]) == (
        "concat",
        [("inner.safetensors", 0.5)],
    )
    whole, scaled = load(inner), load(half)
    for name in KOHYA:
        torch.testing.assert_close(scaled.modules[name].delta(), 0.5 * whole.modules[name].delta())


def test_a_loaded_merge_saved_in_another_format_and_dtype(write, repeats, tmp_path) -> None:
    merged = save_lora(merge([write("a", kohya(4, 0)), write("b", kohya(2, 100))]), tmp_path / "merged.safetensors")
    copy = save_lora(GraphLora(merged, "merged"), tmp_path / "copy.safetensors")
    assert copy.read_bytes() == merged.read_bytes()
    saved = save_lora(GraphLora(merged, "merged"), tmp_path / "half.safetensors", format="comfy", dtype="float16")
    repeats(saved)
    assert load(saved).dtype == torch.float16
    assert [(step.format, step.dtype) for step in read_recipe(saved).conversions] == [("comfy", "float16")]


# ---- what cannot be repeated says so


def why(lora: GraphLora, tmp_path: Path) -> str:
    saved = save_lora(lora, tmp_path / "merged.safetensors", dtype="float16")
    assert load(saved).dtype == torch.float16
    (note,) = [note for note in information(saved)[KEY]["report"]["notes"] if "cannot repeat" in note]
    assert lora.recipe is None
    return note


def test_a_merge_for_a_model_says_that_it_needs_the_model(write, tmp_path) -> None:
    loras = [write("a", kohya(4, 0)), write("b", kohya(2, 100))]
    loaded = replace(read_files(loras), connected="Flux model with CLIP")
    merged, report = merge_loaded(loras, loaded, METHODS["concat"]())
    assert not any("cannot repeat" in note for note in report.notes)
    assert "the connected Flux model with CLIP" in why(merged, tmp_path)
    recipe = read_recipe(tmp_path / "merged.safetensors")
    assert (recipe.format, recipe.dtype) == ("comfy", "float16")
    assert [len(entry.sha256) for entry in recipe.inputs] == [64, 64]


def test_a_merge_of_a_merge_that_is_no_file_says_so(write, tmp_path) -> None:
    inner = merge([write("a", kohya(4, 0)), write("b", kohya(2, 100))])
    assert "lego(a, b) was made in the graph" in why(merge([inner, write("c", kohya(2, 9))]), tmp_path)


def test_a_merge_of_a_trained_lora_says_so(write, tmp_path) -> None:
    trained = GraphLora(kohya(4, 0), "lora1 (trained)")
    assert "lora1 (trained) was made in the graph" in why(merge([trained, write("c", kohya(2, 9))]), tmp_path)


def test_statistics_that_are_no_file_are_named(write, tmp_path) -> None:
    loras = [write("a", kohya(4, 0)), write("b", kohya(2, 100))]
    assert "statistics" in why(merge(loras, statistics=Statistics({})), tmp_path)


def test_suggested_strengths_and_remedies_are_recorded_and_repeated(tmp_path: Path):
    """One LoRA twice: half of each, at the same cap."""
    path = tmp_path / "a.safetensors"
    save_file(kohya(4, 1), path)
    loras = [GraphLora.of_file("a.safetensors", path, 1.0, 1.0) for _ in range(2)]
    remedies = Remedies(cap=1.5, suggested=True)
    lora, report = merge_loaded(loras, read_files(loras), METHODS["concat"](), remedies=remedies)
    assert report.weights == (0.5, 0.5)
    assert report.notes[0].startswith("suggested: a 0.5, a 0.5")
    recipe = lora.recipe
    assert recipe is not None
    assert (recipe.cap, [entry.weight for entry in recipe.inputs]) == (1.5, [0.5, 0.5])
    again, merged = run(recipe).adapter, adapter_of(lora)
    assert list(again.modules) == list(merged.modules)
    assert all(torch.equal(again.modules[name].A, part.A) for name, part in merged.modules.items())
