"""Recipes as text, and methods built from their settings. Running them is tested in test_run.py."""

from __future__ import annotations

import sys

import hypothesis
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.merge.methods import METHODS
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank
from legomole.core.recipes.method_settings import build_method, method_settings
from legomole.core.recipes.recipe import Conversion, Input, Recipe, RecipeError
from legomole.core.recipes.text import recipe_from_text, recipe_to_text

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FULL = Recipe(
    method="lego",
    settings={"rank": "1.5x", "geometry": "paper", "seed": 7, "parameter_reweight": False},
    inputs=[
        Input(path="style.safetensors", sha256="ab" * 32, weight=0.8, text_encoder_weight=0.5),
        Input(path="C:\\loras\\subject.safetensors", weight=-1, module_weights={"*attn2*": 0.5}),
        Input(path="adapter", in_memory=True, convert_rank=4),
    ],
    module_weights={"*single_blocks*": 0.25},
    normalize=True,
    dtype="float16",
    format="kohya",
    convert_rank=32,
    conversions=[Conversion(format="peft", dtype="float16"), Conversion(format="comfy", from_folder=True)],
)


@pytest.mark.parametrize("kind", ["yaml", "toml"])
def test_text_reads_back_equal(kind):
    assert recipe_from_text(recipe_to_text(FULL, kind), kind) == FULL


def test_yaml_is_what_a_person_would_write():
    recipe = Recipe(legomole="0.1.0", method="svd", settings={"rank": 16}, inputs=[Input(path="a.safetensors")])
    assert recipe_to_text(recipe) == (
        "legomole: 0.1.0\nmethod: svd\nsettings:\n  rank: 16\ninputs:\n- path: a.safetensors\n  weight: 1.0\n"
    )


# PyYAML itself cannot write some control characters and line separators; no path has them
TEXT = st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Zl", "Zp"]), max_size=8)


@hypothesis.settings(max_examples=50)
@given(
    path=TEXT,
    weight=st.floats(allow_nan=False),
    tables=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
    settings=st.dictionaries(TEXT, st.one_of(st.booleans(), st.integers(-(2**63), 2**63 - 1), TEXT), max_size=3),
)
def test_any_recipe_survives_both_languages(path, weight, tables, settings):
    """PyYAML and tomllib are the oracles: whatever we write, they read the same data from it."""
    entry = Input(path=path, weight=weight, module_weights=tables)
    recipe = Recipe(method="m", settings=settings, inputs=[entry], module_weights=tables)
    assert tomllib.loads(recipe_to_text(recipe, "toml")) == recipe.to_dict()
    assert yaml.safe_load(recipe_to_text(recipe, "yaml")) == recipe.to_dict()
    assert recipe_from_text(recipe_to_text(recipe, "toml"), "toml") == recipe


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("method: [", "not valid YAML"),
        ("- a\n- b", "not a recipe"),
        ("method: lego", "not a recipe"),  # no inputs
        ("method: lego\ninputs: []", "not a recipe"),
        ("method: lego\ninputs: [{path: a}]\ncolour: red", "not a recipe"),
        ("method: lego\ninputs: [{path: a, weight: loud}]", "not a recipe"),
        ("method: lego\ninputs: [{path: a}]\ndtype: int8", "not a recipe"),
        ("method: lego\ninputs: [{path: a}]\nconvert_rank: 0", "not a recipe"),
        ("method: !!python/object/apply:os.system ['true']\ninputs: [{path: a}]", "not valid YAML"),
    ],
)
def test_a_broken_recipe_is_refused_by_name(text, problem):
    with pytest.raises(RecipeError, match=problem) as caught:
        recipe_from_text(text, "yaml", "my.yaml")
    assert caught.value.file == "my.yaml"


def test_the_error_points_at_the_entry():
    with pytest.raises(RecipeError) as caught:
        recipe_from_text("method: lego\ninputs: [{path: a}, {path: b, weigth: 2}]", "yaml")
    assert caught.value.module == "inputs.1.weigth"
    assert "weight" in str(caught.value.remedy)


def test_toml_errors_are_reported_too():
    with pytest.raises(RecipeError, match="not valid TOML"):
        recipe_from_text("method = ", "toml")


# ---- methods from settings


def test_a_method_from_settings():
    settings = {"rank": "1.5x", "geometry": "paper", "seed": "3", "output_reweight": "false"}
    assert build_method("lego", settings) == Lego(Rank(1.5, "x"), geometry="paper", seed=3, output_reweight=False)


def test_settings_of_spells_out_defaults_and_reads_back():
    plain = method_settings(Lego(Rank(16)))
    assert plain == {"rank": 16, "geometry": "rank-one", "norm": "inf", "starts": 0, "seed": 0}
    assert build_method("lego", plain) == Lego(Rank(16))
    assert method_settings(SVD(Rank(95, "%"))) == {"rank": "95%"}


@pytest.mark.parametrize("name", sorted(set(METHODS) - {"calibrated", "ssr"}))
def test_every_method_goes_through_settings_and_back(name):
    needs = {"rank": 4} if "rank" in METHODS[name].__dataclass_fields__ else {}
    method = build_method(name, needs)
    assert isinstance(method, METHODS[name])
    assert build_method(name, method_settings(method)) == method


@pytest.mark.parametrize(
    ("name", "settings", "problem", "found"),
    [
        ("legolas", {}, "no such method", "legolas"),
        ("svd", {"rank": 4, "norm": "inf"}, "no such setting", "norm"),
        ("concat", {"rank": 4}, "no such setting", "rank"),
        ("calibrated", {}, "needs a setting", "nothing"),
        ("lego", {"rank": 4, "geometry": "flat"}, "cannot have this value", "'flat'"),
        ("lego", {"rank": 4, "seed": 1.5}, "cannot have this value", "1.5"),
        ("lego", {"rank": 4, "parameter_reweight": "perhaps"}, "cannot have this value", "'perhaps'"),
    ],
)
def test_wrong_settings_are_refused(name, settings, problem, found):
    with pytest.raises(RecipeError, match=problem) as caught:
        build_method(name, settings)
    assert caught.value.found == found


@pytest.mark.parametrize("rank", [0, -4, "0", "many", "1.5", "200%"])
def test_a_rank_that_is_none(rank):
    with pytest.raises(MergeError, match="not a rank"):
        build_method("svd", {"rank": rank})
