"""Strengths and settings for `legomole merge`: suggested ones, and the best of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from ..hosts.hub import cached_folder
from ..hosts.names import key_map
from .console import out, progress_bar
from .options import check_free, size_of

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.merge.statistics import Statistics
    from ..core.recipes.recipe import Recipe
    from ..core.recipes.suggest import Suggestion
    from ..core.recipes.sweep import Sweep


@dataclass(frozen=True, eq=False)
class Inputs:
    """The LoRAs of a merge, with statistics that were measured with them.

    Args:
        adapters: The LoRAs under common names, in order.
        statistics: Statistics whose positions refer to them, if there are any.
        statistics_path: File that a recipe named for them.
        why_none: Why there are no statistics.
    """

    adapters: Sequence[Adapter]
    statistics: Statistics | None = None
    statistics_path: Path | None = None
    why_none: str = ""

    @classmethod
    def load(cls, recipe: Recipe, folder: Path, measured: Statistics | None, notes: Sequence[str]) -> Inputs:
        """Load the inputs of a recipe.

        Args:
            recipe: The merge. folder: Base of its relative paths.
            measured: Statistics measured for this merge; default the file that the recipe names.
            notes: Why nothing was measured.
        """
        from ..core.layers.align import align
        from ..core.merge.statistics import Statistics
        from ..core.recipes.run import load_inputs

        path = Path(folder / str(recipe.settings["statistics"])) if "statistics" in recipe.settings else None
        if measured is None and path is not None:
            measured = Statistics.load(path)
        adapters = load_inputs(recipe, folder, cached_folder, verify=measured is not None)
        statistics = None if measured is None else measured.of(adapters)
        return cls(align(adapters, key_map=key_map), statistics, path, "; ".join(notes))


def suggest_settings(
    recipe: Recipe, inputs: Inputs, loudness: Literal["each", "loudest"], *, choose_method: bool, quiet: bool
) -> Suggestion:
    """Suggest strengths and settings for a recipe, and print them unless `quiet`."""
    from ..core.recipes.suggest import suggest

    with progress_bar("measuring", quiet=quiet) as progress:
        suggestion = suggest(
            recipe,
            inputs.adapters,
            loudness,
            statistics=inputs.statistics,
            choose_method=choose_method,
            progress=progress,
        )
    if not quiet:
        out().print(suggestion.text([adapter.label for adapter in inputs.adapters]), markup=False)
    return suggestion


def check_sweep(path: Path, method: str | None, *, has_statistics: bool, overwrite: bool) -> None:
    """Raise an error for a sweep that cannot be made, or whose file could not be written, before any work is done."""
    from ..core.survey.sweep_page import ENDINGS

    if not has_statistics:
        raise typer.BadParameter("--sweep predicts on the base model: give --base MODEL, or --statistics FILE.")
    if method is not None:
        raise typer.BadParameter("--sweep chooses the method: leave out --method.")
    if path.suffix.lower() not in ENDINGS:
        raise typer.BadParameter(f"{path.name}: --sweep writes {', '.join(ENDINGS[:-1])} or {ENDINGS[-1]}.")
    check_free(path, overwrite=overwrite)


def sweep_settings(recipe: Recipe, inputs: Inputs, path: Path, *, device: str, quiet: bool) -> Sweep:
    """Rank candidates for a recipe, write the ranking to a file, and print it unless `quiet`.

    Raises:
        MergeError: There are no statistics; or see `sweep`.
        SaveError: The file could not be written.
    """
    from ..core.errors import MergeError
    from ..core.recipes.sweep import sweep
    from ..core.survey.sweep_page import write_sweep

    if inputs.statistics is None:
        raise MergeError(
            "A sweep needs statistics of the base model, and there are none.",
            found=inputs.why_none or "nothing was measured",
            remedy="give the words or texts of every LoRA, and a model that can be run",
        )
    with progress_bar("predicting", quiet=quiet) as progress:
        swept = sweep(recipe, inputs.adapters, inputs.statistics, device=device, progress=progress)
    write_sweep(swept, path)
    if not quiet:
        out().print(swept.text(), markup=False)
        out().print(f"wrote {path} ({size_of(path)})", markup=False)
    return swept
