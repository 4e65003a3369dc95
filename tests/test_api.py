"""The functions of the package root on files: what one guesses works, and files say how they were made."""

from __future__ import annotations

import json
from pathlib import Path

import legomole
import pytest
import torch
from legomole.core.digest import identity
from legomole.core.errors import FormatError, MergeError, SaveError
from legomole.core.merge.statistics import ModuleStatistics
from legomole.core.recipes.metadata import KEY
from legomole.core.recipes.read import read_recipe
from legomole.core.recipes.recipe import RecipeError

from .lora_files import DIFFUSERS_SD15, KOHYA_SD15, PEFT, state_dict, write

NAMES = [f"lora_unet_down_blocks_0_attn1_to_{x}" for x in "qk"]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for i, name in enumerate("ab"):
        shapes = dict.fromkeys(NAMES, (5, 6))
        write(tmp_path / f"{name}.safetensors", state_dict(shapes, rank=4, seed=i))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_paths_are_merged_and_the_file_repeats_itself(folder: Path) -> None:
    result = legomole.merge(["a.safetensors", folder / "b.safetensors"], "lego", rank=3, weights=[0.8, 1.2])
    assert result.report.weights == (0.8, 1.2)
    assert result.report.ranks_out == (3, 3)
    path = legomole.save(result, "out")
    assert path == Path("out.safetensors")
    recipe = read_recipe(path)
    assert (recipe.method, recipe.settings["rank"], [entry.weight for entry in recipe.inputs]) == (
        "lego",
        3,
        [0.8, 1.2],
    )
    again = legomole.save(legomole.run(path), "again.safetensors")
    assert again.read_bytes() == path.read_bytes()
    assert legomole.save(legomole.run(recipe, folder=folder), "third.safetensors").read_bytes() == path.read_bytes()


def test_adapters_and_instances_of_methods(folder: Path) -> None:
    """The same numbers as from paths, and a recipe in the metadata all the same."""
    loaded = [legomole.load("a.safetensors"), "b.safetensors"]
    for method, settings in (("svd", {"rank": 2}), (legomole.SVD(legomole.Rank(2)), {})):
        result = legomole.merge(loaded, method, **settings)
        paths = legomole.merge(["a.safetensors", "b.safetensors"], "svd", rank=2)
        for name in NAMES:
            assert torch.equal(result.adapter.modules[name].A, paths.adapter.modules[name].A)
        assert result.adapter.metadata == paths.adapter.metadata
        saved = legomole.save(result, "m.safetensors").read_bytes()
        assert saved == legomole.save(paths, "n.safetensors").read_bytes()


def test_the_recipe_says_which_input_was_no_file_and_is_refused(folder: Path) -> None:
    adapter = legomole.Adapter(dict(legomole.load("a.safetensors").modules))
    result = legomole.merge([adapter, "b.safetensors"], "concat")
    first, second = json.loads(result.adapter.metadata[KEY])["recipe"]["inputs"]
    assert first == {"path": "adapter", "weight": 1.0, "in_memory": True}
    assert second["sha256"] == legomole.load("b.safetensors").source.sha256
    assert "in_memory" not in second
    assert result.report.notes == (
        "legomole cannot repeat this merge from its recipe: adapter was no file but an adapter in memory",
    )
    path = legomole.save(result, "m.safetensors")
    for recipe in (path, read_recipe(path)):
        with pytest.raises(RecipeError, match=r"no file but an adapter in memory[\s\S]*in_memory"):
            legomole.run(recipe)


def loha(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"w1_a": (5, 3), "w1_b": (3, 6), "w2_a": (5, 3), "w2_b": (3, 6)}
    return {
        f"{name}.hada_{part}": torch.randn(*shape, generator=generator)
        for name in NAMES
        for part, shape in shapes.items()
    }


def test_adapters_loaded_with_a_convert_rank_repeat_from_their_files(folder: Path) -> None:
    for i in range(2):
        write(folder / f"loha{i}.safetensors", loha(i))
    loaded = [legomole.load(f"loha{i}.safetensors", convert_rank=rank) for i, rank in enumerate((2, 3))]
    result = legomole.merge([*loaded, "loha0.safetensors"], "concat", convert_rank=4)
    path = legomole.save(result, "m.safetensors")
    recipe = read_recipe(path)
    assert [entry.convert_rank for entry in recipe.inputs] == [2, 3, None]
    assert recipe.convert_rank == 4
    assert [entry.sha256 for entry in recipe.inputs[:2]] == [lora.source.sha256 for lora in loaded]
    again = legomole.save(legomole.run(path), "again.safetensors")
    assert again.read_bytes() == path.read_bytes()


def test_adapters_loaded_with_a_convert_rank_fit_their_own_statistics(folder: Path) -> None:
    for i in range(2):
        write(folder / f"loha{i}.safetensors", loha(i))
    loaded = [legomole.load(f"loha{i}.safetensors", convert_rank=2) for i in range(2)]
    eye = torch.eye(6)
    moments = dict.fromkeys(NAMES, ModuleStatistics({0: eye, 1: 2 * eye}, base=eye))
    legomole.Statistics(moments, tuple(map(identity, loaded))).save("measured.safetensors")
    result = legomole.merge(loaded, "calibrated", rank=2, statistics="measured.safetensors")
    path = legomole.save(result, "m.safetensors")
    assert legomole.save(legomole.run(path), "again.safetensors").read_bytes() == path.read_bytes()


def test_weights_of_text_encoders_and_modules(folder: Path) -> None:
    state = state_dict({NAMES[0]: (5, 6), "lora_te_text_model_encoder_layers_0_mlp_fc1": (5, 6)}, rank=2)
    write(folder / "te.safetensors", state)
    result = legomole.merge(
        ["te.safetensors"], "concat", weights=[2], text_encoder_weights=[0.5], module_weights={"*attn1*": 3}
    )
    (before, after) = legomole.load("te.safetensors"), result.adapter
    for name, factor in zip(sorted(before.modules, key=lambda n: "te_" in n), (6.0, 0.5), strict=True):
        torch.testing.assert_close(after.modules[name].delta(), factor * before.modules[name].delta())


def test_dialects_meet_by_themselves(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    kohya = write(tmp_path / "kohya.safetensors", state_dict(KOHYA_SD15, seed=1))
    diffusers = write(tmp_path / "diffusers.safetensors", state_dict(DIFFUSERS_SD15, PEFT, alpha=None, seed=2))
    result = legomole.merge([kohya, diffusers], "concat")
    assert len(result.report.modules) == len(KOHYA_SD15)
    assert {len(module.adapters) for module in result.report.modules} == {2}
    first, second = legomole.align([legomole.load(kohya), legomole.load(diffusers)])
    assert list(first.modules) == list(second.modules)
    saved = legomole.load(legomole.save(legomole.load(kohya), tmp_path / "d.safetensors", format="diffusers"))
    assert set(saved.modules) == set(DIFFUSERS_SD15)


def test_statistics_as_a_value_are_marked_as_not_saved(folder: Path) -> None:
    hashes = tuple(legomole.load(f"{x}.safetensors").source.sha256 for x in "ab")
    eye = torch.eye(6)
    statistics = legomole.Statistics(dict.fromkeys(NAMES, ModuleStatistics({0: eye, 1: eye}, base=eye)), hashes)
    statistics.save("measured.safetensors")
    from_file = legomole.merge(["a.safetensors", "b.safetensors"], statistics="measured.safetensors", rank=2)
    in_memory = legomole.merge(["a.safetensors", "b.safetensors"], statistics=statistics, rank=2)
    mixed = legomole.merge([legomole.load("a.safetensors"), "b.safetensors"], statistics="measured.safetensors", rank=2)
    for other in (in_memory, mixed):
        for name in NAMES:
            assert torch.equal(other.adapter.modules[name].A, from_file.adapter.modules[name].A)
    assert mixed.adapter.metadata == from_file.adapter.metadata
    legomole.save(from_file, "one.safetensors")
    assert (
        legomole.save(legomole.run("one.safetensors"), "two.safetensors").read_bytes()
        == Path("one.safetensors").read_bytes()
    )
    assert in_memory.report.notes == (
        "legomole cannot repeat this merge from its recipe: the statistics were not given as a file",
    )
    assert from_file.report.notes == ()
    with pytest.raises(FormatError, match="no such file"):
        legomole.run(legomole.save(in_memory, "three.safetensors"))


def test_what_does_not_fit_is_an_error(folder: Path) -> None:
    both = ["a.safetensors", "b.safetensors"]
    with pytest.raises(MergeError, match="nothing to merge"):
        legomole.merge([])
    with pytest.raises(MergeError, match="Every LoRA needs one weight"):
        legomole.merge(both, weights=[1.0])
    with pytest.raises(RecipeError, match="no such method"):
        legomole.merge(both, "average")
    with pytest.raises(RecipeError, match="no such setting"):
        legomole.merge(both, "svd", rank=2, colour="red")
    with pytest.raises(RecipeError, match="dtype"):
        legomole.merge(both, "concat", dtype="int8")
    with pytest.raises(MergeError, match="given by name"):
        legomole.merge(both, legomole.Concat(), rank=2)
    with pytest.raises(FormatError, match="no such file"):
        legomole.merge(["missing.safetensors"], "concat")
    with pytest.raises(MergeError, match="part of its recipe"):
        legomole.save(legomole.merge(both, "concat"), "m", dtype=torch.float16)
    with pytest.raises(SaveError, match="does not exist"):
        legomole.save(legomole.merge(both, "concat"), "nowhere/m")


def test_a_loaded_merge_saved_in_another_form_repeats(folder: Path) -> None:
    path = legomole.save(legomole.merge(["a.safetensors", "b.safetensors"], "concat"), "m.safetensors")
    for settings in ({"dtype": torch.bfloat16}, {"format": "comfy"}, {"format": "comfy", "dtype": torch.float16}):
        saved = legomole.save(legomole.load(path), "other.safetensors", **settings)
        assert saved.read_bytes() != path.read_bytes()
        assert legomole.save(legomole.run(saved), "again.safetensors").read_bytes() == saved.read_bytes()


def test_dtype_is_part_of_the_recipe(folder: Path) -> None:
    result = legomole.merge(["a.safetensors", "b.safetensors"], "svd", rank=2, dtype=torch.float16)
    path = legomole.save(result, "half.safetensors")
    assert legomole.load(path).dtype == torch.float16
    assert read_recipe(path).dtype == "float16"


def test_all_that_is_public_resolves_and_nothing_else_is_listed() -> None:
    names = dir(legomole)
    assert {"merge", "save", "load", "align", "run", "Recipe", "Record", "experts", "mixed", "routed"} <= set(names)
    assert {"Lego", "SVD", "Concat", "Linear", "Ties", "Dare", "Knots", "Calibrated", "train_gates"} <= set(names)
    assert not {"importlib", "Any", "annotations"} & set(names)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = legomole.nonsense


def test_dtypes_have_short_names(tmp_path: Path) -> None:
    adapter = legomole.Adapter({"x.y": legomole.LowRank(torch.ones(1, 2), torch.ones(2, 1))})
    assert legomole.merge([adapter], "concat", dtype="bf16").adapter.dtype == torch.bfloat16
    assert legomole.load(legomole.save(adapter, tmp_path / "x", dtype="fp16")).dtype == torch.float16
    with pytest.raises(MergeError, match="no such dtype"):
        legomole.save(adapter, tmp_path / "y", dtype="fp8")
