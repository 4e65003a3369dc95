"""Run a recipe for `legomole merge` and `compress`: check the output, merge, save, and print the report."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from ..hosts.hub import cached_folder
from ..hosts.names import key_map, rename_for_format
from .console import out, print_json, progress_bars
from .environment import check_device, import_host
from .options import check_output, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.merge.statistics import Statistics
    from ..core.recipes.recipe import Recipe
    from ..core.recipes.suggest import Suggestion
    from ..core.recipes.sweep import Sweep


def check_target(recipe: Recipe, folder: Path, output: Path, *, overwrite: bool) -> Path:
    """Return the path that will be written, see `check_output`."""
    from ..core.formats import summarise
    from ..core.recipes.run import input_paths

    paths = input_paths(recipe, folder, cached_folder)
    format = recipe.final_format or (recipe.reader if recipe.reader == "peft" else summarise(paths[0]).format)
    return check_output(output, format, paths, overwrite=overwrite)


def run_recipe(
    recipe: Recipe,
    folder: Path,
    output: Path,
    *,
    measured: Statistics | None = None,
    notes: Sequence[str] = (),
    suggestion: Suggestion | None = None,
    swept: Sweep | None = None,
    device: str,
    ray: str | None = None,
    overwrite: bool,
    json: bool,
) -> None:
    """Run a recipe, save the result and print its report.

    Args:
        recipe: The merge.
        folder: Base of its relative paths.
        output: Path as typed.
        measured, notes: Statistics and notes of `calibrate_merge`.
        suggestion, swept: What the recipe's strengths and settings were taken from, for JSON.
        device, ray, overwrite, json: Options as typed.
    """
    from ..core.formats import save
    from ..core.recipes.run import run

    check_device(device)
    target = check_target(recipe, folder, output, overwrite=overwrite)
    with (
        nullcontext() if ray is None else import_host("ray").ray_runner(ray) as remote,
        progress_bars("reading", "merging", quiet=json) as (loading, progress),
    ):
        result = run(
            recipe, folder=folder, key_map=key_map, rename_for_format=rename_for_format, find_cached=cached_folder,
            device=device, loading=loading, progress=progress, remote=remote, statistics=measured, notes=notes,
        )  # fmt: skip
    written = save(result.adapter, target)
    if json:
        data = {} if suggestion is None else {"suggestion": suggestion.to_dict()}
        data |= {} if swept is None else {"sweep": swept.to_dict()}
        print_json({"output": str(written), **data, "report": result.report.to_dict()})
        return
    out().print(result.report.text(), markup=False)
    out().print(f"wrote {written} ({size_of(written)})", markup=False)
