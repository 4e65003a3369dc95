"""Long and short names of dtypes."""

from __future__ import annotations

import pytest
import torch
from legomole.core.recipes.dtype_names import DTYPES, SHORT_NAMES, full_dtype_name
from legomole.core.recipes.recipe import RecipeError
from legomole.core.recipes.text import recipe_from_text


def test_every_name_is_torchs_own() -> None:
    assert set(SHORT_NAMES.values()) == set(DTYPES)
    assert [full_dtype_name(str(getattr(torch, name))) for name in DTYPES] == list(DTYPES)
    assert [full_dtype_name(name) for name in ("fp32", "fp16", "bf16", "float8")] == [*DTYPES, "float8"]


@pytest.mark.parametrize("name", [*DTYPES, *SHORT_NAMES])
def test_recipes_take_all_names_and_store_the_long_one(name: str) -> None:
    recipe = recipe_from_text(f"method: lego\ninputs: [{{path: a}}]\ndtype: {name}", "yaml")
    assert recipe.dtype == full_dtype_name(name)


def test_other_names_are_an_error() -> None:
    for name in ("float64", "8"):
        with pytest.raises(RecipeError, match="dtype"):
            recipe_from_text(f"method: lego\ninputs: [{{path: a}}]\ndtype: {name}", "yaml")
