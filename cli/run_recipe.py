"""What `legomole merge` and `compress` do with a recipe."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..hosts.hub import cached
from ..hosts.names import key_map, names_for_format
from .console import out, print_json, progress_bars
from .environment import check_device, host
from .options import DEFAULT_RANK, check_output, size_of


def check_target(recipe: Any, folder: Path, output: Path, *, overwrite: bool) -> Path:
    """The path that will be written, see `check_output`."""
    from ..core.formats import summarise
    from ..core.recipes.run import place

    paths = [place(entry.path, folder, cached) for entry in recipe.inputs]
    return check_output(output, recipe.format or summarise(paths[0]).format, paths, overwrite=overwrite)


def ranked(recipe: Any) -> Any:
    """The recipe with the default rank, where its method has one and it says none."""
    from ..core.merge.methods import METHODS

    fields = getattr(METHODS.get(recipe.method), "__dataclass_fields__", {})
    if "rank" not in fields or "rank" in recipe.settings:
        return recipe
    return recipe.model_copy(update={"settings": {"rank": DEFAULT_RANK, **recipe.settings}})


def run_recipe(
    recipe: Any,
    folder: Path,
    output: Path,
    *,
    device: str,
    ray: str | None = None,
    overwrite: bool,
    json: bool,
) -> None:
    """Merge, save and tell what came of it."""
    from ..core.formats import save
    from ..core.recipes.run import run

    check_device(device)
    recipe = ranked(recipe)
    target = check_target(recipe, folder, output, overwrite=overwrite)
    with (
        nullcontext() if ray is None else host("ray").ray_runner(ray) as spread,
        progress_bars("reading", "merging", quiet=json) as (reading, progress),
    ):
        result = run(
            recipe, folder=folder, key_map=key_map, spell=names_for_format, cached=cached, device=device,
            reading=reading, progress=progress, spread=spread,
        )  # fmt: skip
    written = save(result.adapter, target)
    if json:
        print_json({"output": str(written), "report": result.report.to_dict()})
        return
    out().print(result.report.text(), markup=False)
    out().print(f"wrote {written} ({size_of(written)})", markup=False)
