"""Conversions of merged files: recorded in the recipe, and repeated by it byte for byte."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import CONFIG_KEY, Adapter
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank
from legomole.core.recipes.conversion import convert
from legomole.core.recipes.metadata import KEY, NOT_REPEATABLE
from legomole.core.recipes.read import read_recipe
from legomole.core.recipes.recipe import Conversion, Input, Recipe
from legomole.core.recipes.run import run

KOHYA = ["lora_unet_down_blocks_0_attn1_to_q", "lora_unet_down_blocks_0_conv"]
DIFFUSERS = ["unet.down_blocks.0.attn1.to_q", "unet.down_blocks.0.conv"]
LLAMA = ["model.layers.0.q_proj", "model.layers.1.q_proj"]


def keep_names(adapter: Adapter, format: str) -> Adapter:
    return adapter


def adapter(names: list[str], seed: int, *, kernel: tuple[int, ...] = (), bias: bool = True) -> Adapter:
    g = torch.Generator().manual_seed(seed)
    modules = {
        name: LowRank(
            torch.randn(seed + 2, 18, generator=g), torch.randn(5, seed + 2, generator=g), 0.3 * (seed + i + 1), shape
        )
        for i, (name, shape) in enumerate(zip(names, ((), kernel), strict=True))
    }
    diffs = {f"{names[0]}.bias": torch.randn(5, generator=g)} if bias else {}
    return Adapter(modules, diffs, {"some.embedding": torch.randn(3, generator=g)}, {"ss_v2": "False"})


@pytest.fixture
def merged(tmp_path: Path) -> Callable[..., Path]:
    """Merges two files of a format by concat; returns the merged file."""

    def write(names: list[str], format: str, suffix: str = ".safetensors", **kind: object) -> Path:
        inputs: list[Input] = []
        for seed in (0, 1):
            path = save(adapter(names, seed, **kind), tmp_path / f"{seed}", format=format)
            if format == "peft" and suffix:  # the weights alone, as in a single file of an image model
                path = (path / "adapter_model.safetensors").rename(tmp_path / f"{seed}.safetensors")
            inputs.append(Input(path=path.name, weight=0.7))
        result = run(
            Recipe(method="concat", inputs=inputs, format=format), folder=tmp_path, rename_for_format=keep_names
        )
        return save(result.adapter, tmp_path / f"merged{suffix}")

    return write


def contents(path: Path) -> list[bytes]:
    return [path.read_bytes()] if path.is_file() else [each.read_bytes() for each in sorted(path.iterdir())]


def assert_repeats(path: Path) -> None:
    again = run(read_recipe(path), folder=path.parent, rename_for_format=keep_names).adapter
    written = save(again, path.with_name(f"again-{path.name}"))
    assert contents(written) == contents(path)


CASES = [
    (KOHYA, "kohya", ".safetensors", {"kernel": (3, 3)}, ["comfy"]),
    (KOHYA, "comfy", ".safetensors", {"kernel": (3, 3)}, ["kohya", "comfy"]),
    (DIFFUSERS, "diffusers", ".safetensors", {"kernel": (3, 3)}, ["comfy", "diffusers"]),
    (DIFFUSERS, "comfy", ".safetensors", {"kernel": (3, 3)}, ["diffusers", "comfy"]),
    (LLAMA, "peft", ".safetensors", {"bias": False}, ["comfy", "diffusers"]),
    (LLAMA, "peft", "", {"bias": False}, ["comfy", "peft", "diffusers"]),
]


@pytest.mark.parametrize(("names", "format", "suffix", "kind", "targets"), CASES)
def test_a_chain_of_conversions_repeats(merged, tmp_path, names, format, suffix, kind, targets) -> None:
    path = merged(names, format, suffix, **kind)
    assert_repeats(path)
    for number, (target, dtype) in enumerate(zip(targets, (torch.float16, None, torch.bfloat16), strict=False)):
        converted = convert(load(path), target, dtype, rename_for_format=keep_names)
        path = save(converted, tmp_path / f"{number}-{target}", format=target)
        assert_repeats(path)
    assert [step.format for step in read_recipe(path).conversions] == targets


def test_values_and_recipe_are_those_of_the_conversion(merged, tmp_path) -> None:
    path = merged(KOHYA, "kohya")
    half = load(save(convert(load(path), dtype=torch.float16), tmp_path / "half"))
    for name, part in load(path).modules.items():
        assert torch.equal(half.modules[name].A, part.A.half())
    recipe = read_recipe(tmp_path / "half.safetensors")
    assert recipe.model_copy(update={"conversions": []}) == read_recipe(path)
    assert recipe.conversions == [Conversion(format="kohya", dtype="float16")]
    assert recipe.final_format == "kohya"


def test_without_a_change_the_file_stays_the_same(merged, tmp_path) -> None:
    path = merged(KOHYA, "kohya")
    copy = save(convert(load(path), "kohya", rename_for_format=keep_names), tmp_path / "copy")
    assert copy.read_bytes() == path.read_bytes()


def test_a_result_that_never_was_a_file_converts_to_the_same_bytes(merged, tmp_path) -> None:
    """Saving adds metadata and alphas that the result in memory has not."""
    path = merged(KOHYA, "kohya")
    result = run(read_recipe(path), folder=tmp_path).adapter
    direct = save(convert(result, "comfy", torch.float16), tmp_path / "direct", format="comfy")
    from_file = save(convert(load(path), "comfy", torch.float16), tmp_path / "from_file", format="comfy")
    assert direct.read_bytes() == from_file.read_bytes()
    assert_repeats(direct)


def test_a_lora_without_a_recipe_gets_none(tmp_path) -> None:
    path = save(adapter(KOHYA, 0), tmp_path / "plain", format="kohya")
    assert convert(load(path), "comfy", torch.float16).metadata == load(path).metadata


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda lora: convert(lora, "comfy", torch.float64), "recipes know no torch.float64"),
        (lambda lora: convert(lora, "diffusers"), "layers such as model.layers.0.q_proj and 1 more would be renamed"),
        (lambda lora: convert(lora.sourced(convert_rank=4), "comfy"), "approximated at rank 4"),
    ],
)
def test_what_cannot_be_repeated_is_noted_in_the_file(merged, change, words) -> None:
    lora = load(merged(LLAMA, "peft", "", bias=False))
    assert CONFIG_KEY in lora.metadata
    data = json.loads(change(lora).metadata[KEY])
    assert data["recipe"] == json.loads(lora.metadata[KEY])["recipe"]
    assert data["report"]["notes"][-1].startswith(NOT_REPEATABLE)
    assert words in data["report"]["notes"][-1]


@pytest.mark.parametrize("text", ["{", "[]", '{"recipe": 3}', '{"recipe": {"conversions": 3}}'])
def test_a_broken_recipe_does_not_stop_a_conversion(tmp_path, text) -> None:
    lora = Adapter(adapter(KOHYA, 0).modules, metadata={KEY: text})
    path = save(lora, tmp_path / "broken", format="kohya")
    assert convert(load(path), "comfy", torch.float16).metadata[KEY] == text
