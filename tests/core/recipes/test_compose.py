"""Composing recipes from options: plain data in, a recipe out."""

from __future__ import annotations

import pytest
from legomole.core.recipes.compose import compose
from legomole.core.recipes.recipe import Conversion, Input, Recipe, RecipeError

A, B = {"path": "a.safetensors"}, {"path": "b.safetensors", "weight": 0.5}


def base(**fields) -> Recipe:
    return Recipe(
        method="lego",
        settings={"rank": 2, "seed": 1, "statistics": "s.safetensors"},
        inputs=[Input(**A, module_weights={"*q*": 2.0}), Input(**B)],
        module_weights={"*k*": 3.0},
        statistics_sha256="ab",
        **fields,
    )


def test_without_a_base() -> None:
    recipe = compose(inputs=[A, B], settings={"rank": 4, "seed": None})
    assert recipe.method == "lego"
    assert recipe.settings == {"rank": 4}
    assert recipe.inputs == [Input(**A), Input(**B)]


def test_what_is_given_replaces_the_base() -> None:
    recipe = compose(base(dtype="float16"), settings={"seed": 9}, dtype="float32", normalize=True, convert_rank=3)
    assert recipe.settings == {"rank": 2, "seed": 9, "statistics": "s.safetensors"}
    assert (recipe.dtype, recipe.normalize, recipe.convert_rank) == ("float32", True, 3)
    assert recipe.inputs == base().inputs
    assert recipe.statistics_sha256 == "ab"
    assert compose(base()) == base()


def test_inputs_replace_the_whole_list() -> None:
    recipe = compose(base(), inputs=[B])
    assert recipe.inputs == [Input(**B)]
    assert recipe.module_weights == {"*k*": 3.0}


def test_another_method_drops_the_settings_and_the_statistics() -> None:
    recipe = compose(base(), method="svd", settings={"rank": "95%"})
    assert (recipe.method, recipe.settings, recipe.statistics_sha256) == ("svd", {"rank": "95%"}, "")
    assert compose(base(), method="lego").settings == base().settings


def test_other_statistics_drop_the_hash_of_the_old_ones() -> None:
    recipe = compose(base(), settings={"statistics": "t.safetensors"})
    assert (recipe.settings["statistics"], recipe.settings["rank"], recipe.statistics_sha256) == (
        "t.safetensors",
        2,
        "",
    )


def test_conversions_are_kept_unless_dtype_or_format_are_given() -> None:
    converted = base(conversions=[Conversion(format="comfy", dtype="float16")])
    assert compose(converted, settings={"rank": 4}, inputs=[B]).conversions == converted.conversions
    for fields in ({"dtype": "float32"}, {"format": "kohya"}):
        assert compose(converted, **fields).conversions == []


def test_module_weights_replace_equal_patterns_and_join_the_others() -> None:
    recipe = compose(base(), module_weights={"*k*": 0.5, "*v*": 0.0}, input_module_weights=[{"*q*": 0.1}, {"*o*": 4.0}])
    assert recipe.module_weights == {"*k*": 0.5, "*v*": 0.0}
    assert [entry.module_weights for entry in recipe.inputs] == [{"*q*": 0.1}, {"*o*": 4.0}]


def test_errors_name_the_field() -> None:
    with pytest.raises(RecipeError, match="inputs"):
        compose()
    with pytest.raises(RecipeError) as caught:
        compose(inputs=[A], dtype="int8", file="r.yaml")
    assert (caught.value.module, caught.value.file) == ("dtype", "r.yaml")
