"""Recipes carried out: from files to a merged adapter that can be made again."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError, MergeError
from legomole.core.formats import load, save
from legomole.core.lowrank import LowRank
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.recipes.metadata import KEY
from legomole.core.recipes.read import read_recipe, recipe_in
from legomole.core.recipes.recipe import Input, Recipe, RecipeError
from legomole.core.recipes.run import run
from legomole.core.recipes.text import recipe_to_text
from safetensors.torch import save_file

NAMES = [f"lora_unet_down_blocks_0_{kind}_to_{x}" for kind in ("attn1", "attn2") for x in "qk"]


def write(path: Path, rank: int, seed: int, *, names=NAMES, **metadata: str) -> Path:
    g = torch.Generator().manual_seed(seed)
    modules = {n: LowRank(torch.randn(rank, 6, generator=g), torch.randn(5, rank, generator=g)) for n in names}
    return save(Adapter(modules, metadata=metadata), path, format="kohya")


@pytest.fixture
def folder(tmp_path) -> Path:
    write(tmp_path / "a.safetensors", 4, 1, ss_base_model_version="sd_v1")
    write(tmp_path / "b.safetensors", 2, 2, ss_base_model_version="sd_v1")
    return tmp_path


def recipe(method="lego", settings=None, **fields) -> Recipe:
    inputs = fields.pop("inputs", [Input(path="a.safetensors", weight=0.5), Input(path="b.safetensors")])
    return Recipe(method=method, settings={"rank": 3} if settings is None else settings, inputs=inputs, **fields)


def test_paths_are_relative_to_the_recipes_folder(folder):
    """The exact sum, with each input's own weights."""
    entries = [
        Input(path="a.safetensors", weight=0.5, module_weights={"*attn2*": 2}),
        Input(path=str(folder / "b.safetensors"), weight=-1),
    ]
    merged = run(recipe("concat", {}, inputs=entries), folder=folder).adapter
    a, b = load(folder / "a.safetensors"), load(folder / "b.safetensors")
    for name in NAMES:
        weight = 1.0 if "attn2" in name else 0.5
        want = weight * a.modules[name].delta() - b.modules[name].delta()
        torch.testing.assert_close(merged.modules[name].delta(), want)


def test_patterns_for_all_reach_those_that_have_such_modules(folder):
    write(folder / "c.safetensors", 1, 3, names=[NAMES[0], "lora_unet_only_here"])
    entries = [Input(path=f"{x}.safetensors") for x in "abc"]
    merged = run(recipe("concat", {}, inputs=entries, module_weights={"*only*": 0.5, "*attn1*": 0}), folder=folder)
    assert {name for name in merged.adapter.modules if "attn1" in name} == set()
    want = 0.5 * load(folder / "c.safetensors").modules["lora_unet_only_here"].delta()
    torch.testing.assert_close(merged.adapter.modules["lora_unet_only_here"].delta(), want)


def test_patterns_for_all_reach_layers_that_only_have_a_diff(folder):
    layer = f"{NAMES[0]}."
    norm = {f"{layer}lora_down.weight": torch.ones(1, 4), f"{layer}lora_up.weight": torch.ones(4, 1)}
    save_file({**norm, "lora_unet_norm.w_norm": torch.ones(4)}, folder / "norm.safetensors")
    entries = [Input(path="norm.safetensors"), Input(path="norm.safetensors")]
    merged = run(recipe("concat", {}, inputs=entries, module_weights={"*norm": 0.25}), folder=folder).adapter
    torch.testing.assert_close(merged.diffs["lora_unet_norm.weight"], torch.full((4,), 0.5))  # 0.25 + 0.25


def test_a_pattern_without_a_match_is_an_error(folder):
    with pytest.raises(MergeError, match="matches nothing"):
        run(recipe(module_weights={"*nowhere*": 2}), folder=folder)


def test_a_merged_file_repeats_itself_byte_for_byte(folder):
    first = save(run(recipe(settings={"rank": "1.5x", "seed": 3}), folder=folder).adapter, folder / "first.safetensors")
    again = read_recipe(first)
    assert again.settings["seed"] == 3
    assert again.settings["geometry"] == "rank-one"  # spelled out, whatever a later default may be
    second = save(run(again, folder=folder).adapter, folder / "second.safetensors")
    assert first.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("kind", ["yaml", "toml"])
def test_a_recipe_file_gives_the_same_bytes(folder, kind):
    path = folder / f"recipe.{kind}"
    path.write_text(recipe_to_text(recipe(dtype="float16"), kind), encoding="utf-8")
    results = [run(r, folder=folder).adapter for r in (recipe(dtype="float16"), read_recipe(path))]
    saved = [save(result, folder / f"{i}.safetensors").read_bytes() for i, result in enumerate(results)]
    assert saved[0] == saved[1]
    assert results[0].dtype == torch.float16


def test_an_input_that_changed_is_refused_by_its_hash(folder):
    merged = save(run(recipe(), folder=folder).adapter, folder / "m.safetensors")
    old = load(folder / "b.safetensors").source.sha256
    write(folder / "b.safetensors", 2, 99)
    with pytest.raises(RecipeError, match="not the file this recipe was written for") as caught:
        run(read_recipe(merged), folder=folder)
    assert caught.value.file == str(folder / "b.safetensors")
    assert caught.value.expected == f"sha256 {old}"
    assert caught.value.found == f"sha256 {load(folder / 'b.safetensors').source.sha256}"


def test_an_input_that_is_gone_is_named(folder):
    merged = save(run(recipe(), folder=folder).adapter, folder / "m.safetensors")
    (folder / "a.safetensors").unlink()
    with pytest.raises(FormatError, match="no such file") as caught:
        run(read_recipe(merged), folder=folder)
    assert caught.value.file == str(folder / "a.safetensors")


def test_wrong_settings_are_reported_before_a_file_is_read(tmp_path):
    with pytest.raises(RecipeError, match="no such setting"):
        run(recipe(settings={"rank": 3, "colour": "red"}), folder=tmp_path)


def test_another_version_is_noted(folder):
    notes = run(recipe(legomole="0.0.1"), folder=folder).report.notes
    assert any("written by legomole 0.0.1" in note and "Results change" in note for note in notes)


def test_a_different_base_model_is_noted(folder):
    write(folder / "b.safetensors", 2, 2, ss_base_model_version="sd_v2")
    result = run(recipe(), folder=folder)
    assert "ss_base_model_version differs: sd_v1 (a), sd_v2 (b)" in result.report.notes
    assert "ss_base_model_version" not in result.adapter.metadata
    assert "ss_base_model_version differs" in result.adapter.metadata[KEY]


def test_an_unknown_scale_is_noted(folder):
    named = Adapter({f"model.layers.0.{x}": LowRank(torch.ones(2, 6), torch.ones(5, 2)) for x in "qk"})
    peft = save(named, folder / "whole", format="peft")
    (peft / "adapter_model.safetensors").rename(folder / "alone.safetensors")
    result = run(recipe(inputs=[Input(path="alone.safetensors")], settings={"rank": 2}), folder=folder)
    assert result.report.notes == ("alone has no adapter_config.json: its scale was assumed to be 1",)


def test_a_calibrated_merge_reads_its_statistics(folder):
    """With unit second moments for every concept the calibrated merge is finite, repeatable, and names its file."""
    hashes = tuple(load(folder / f"{x}.safetensors").source.sha256 for x in "ab")
    moments = ModuleStatistics(own={0: torch.eye(6), 1: torch.eye(6)}, base=torch.eye(6))
    Statistics(dict.fromkeys(NAMES, moments), hashes).save(folder / "stats.safetensors")
    calibrated = recipe("calibrated", {"rank": 2, "statistics": "stats.safetensors"})
    first = save(run(calibrated, folder=folder).adapter, folder / "first.safetensors")
    settings = read_recipe(first).settings
    assert settings["statistics"] == "stats.safetensors"
    assert settings["mu"] == 10.0
    second = save(run(read_recipe(first), folder=folder).adapter, folder / "second.safetensors")
    assert first.read_bytes() == second.read_bytes()
    Statistics(dict.fromkeys(NAMES, ModuleStatistics(base=2 * torch.eye(6))), hashes).save(folder / "stats.safetensors")
    with pytest.raises(RecipeError, match="not the file this recipe was written for") as caught:
        run(read_recipe(first), folder=folder)
    assert caught.value.file == str(folder / "stats.safetensors")


# ---- finding recipes


def test_a_file_without_a_recipe_says_so(folder):
    with pytest.raises(RecipeError, match="not made by a legomole merge"):
        read_recipe(folder / "a.safetensors")
    assert recipe_in({}) is None


@pytest.mark.parametrize("text", ["", "{", "{}", '{"recipe": 3}', "[]", '{"recipe": {"method": "lego"}}'])
def test_a_broken_recipe_in_the_metadata_is_an_error(text):
    with pytest.raises(RecipeError):
        recipe_in({KEY: text}, "m.safetensors")


def test_a_recipe_file_that_is_missing_or_binary(tmp_path):
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "none.yaml")
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="cannot be read"):
        read_recipe(tmp_path / "binary.toml")


def test_the_metadata_is_json_other_programs_can_read(folder):
    data = json.loads(run(recipe(), folder=folder).adapter.metadata[KEY])
    assert set(data) == {"recipe", "report"}
    assert set(data["report"]["modules"]) == set(NAMES)


def test_loading_is_reported_before_merging(folder):
    calls = []
    run(recipe(), folder=folder, loading=lambda *x: calls.append(x), progress=lambda *x: calls.append(x[:2]))
    assert calls == [(1, 2, "a.safetensors"), (2, 2, "b.safetensors"), (4, 4)]


def test_remote_inputs_are_opened_as_the_local_ones(folder):
    """Under the recipe's names, though from absolute paths; a file that was replaced is refused."""
    opened = []

    def remote(inputs, merger, batches):
        opened.append(inputs)
        return (merger(inputs.open(), batch) for batch in batches)

    here, there = (run(recipe(), folder=folder, remote=runner) for runner in (None, remote))
    assert {n: p.A.tolist() for n, p in there.adapter.modules.items()} == {
        n: p.A.tolist() for n, p in here.adapter.modules.items()
    }
    assert there.adapter.metadata == here.adapter.metadata
    (inputs,) = opened
    assert inputs.names == ("a.safetensors", "b.safetensors") or inputs.names[0].endswith("a.safetensors")
    write(folder / "b.safetensors", 2, 3, ss_base_model_version="sd_v1")
    with pytest.raises(FormatError, match="The file differs"):
        inputs.open()
    (folder / "b.safetensors").unlink()
    with pytest.raises(FormatError, match="no such file"):
        inputs.open()


def test_an_input_may_have_a_convert_rank_of_its_own(folder):
    full = {f"{NAMES[0]}.diff": torch.randn(5, 6, generator=torch.Generator().manual_seed(4))}
    save_file(full, folder / "full.safetensors")
    entries = [Input(path="full.safetensors", convert_rank=2), Input(path="full.safetensors")]
    made = run(recipe("concat", {}, inputs=entries, convert_rank=5), folder=folder)
    assert made.report.modules[0].ranks_in == (2, 5)
    again = run(read_recipe(save(made.adapter, folder / "m.safetensors")), folder=folder)
    assert again.report.modules[0].ranks_in == (2, 5)
