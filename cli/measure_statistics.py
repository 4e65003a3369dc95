"""Measure the statistics of a calibrated merge, for `legomole merge --calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..hosts.hub import cached_folder
from .console import out, progress_bar
from .environment import default_dtype, import_host
from .gates_input import parse_size, parse_words, read_lines
from .options import check_free, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.recipes.recipe import Recipe


def measure_statistics(
    pipeline: str,
    recipe: Recipe,
    folder: Path,
    words: Sequence[str],
    prompts: Path | None,
    target: Path,
    *,
    size: str | None,
    guidance: float | None,
    paint_steps: int,
    seed: int | None,
    device: str,
    overwrite: bool,
    json: bool,
) -> None:
    """Measure the statistics of a merge and write them to `target`.

    Args:
        pipeline: Folder or name of the diffusers pipeline.
        recipe: The merge; its LoRAs and their weights are used.
        folder: Base of the recipe's relative paths.
        words: Words of each LoRA, separated by commas.
        prompts: File with one prompt per line.
        target: File to write.
        size, guidance, paint_steps, seed, device, overwrite, json: Options as typed.

    Raises:
        MergeError: Out of memory, or an error of `calibrate_pipeline`.
    """
    import torch

    from ..core.formats import load
    from ..core.memory import report_out_of_memory
    from ..core.recipes.run import input_paths
    from ..core.train.measure import CalibrationSettings

    concepts = parse_words(words, len(recipe.inputs))
    pixels = None if size is None else parse_size(size)
    texts = [] if prompts is None else read_lines(prompts)
    check_free(target, overwrite=overwrite)
    adapters = [
        load(path, convert_rank=entry.convert_rank or recipe.convert_rank)
        for entry, path in zip(recipe.inputs, input_paths(recipe, folder, cached_folder), strict=True)
    ]
    total = sum(abs(entry.weight) for entry in recipe.inputs) if recipe.normalize else 1.0
    pipe = import_host("diffusers.training").load_pipeline(
        pipeline, device=device, dtype=getattr(torch, default_dtype(device))
    )
    with (
        progress_bar("measuring", quiet=json, show_step=True) as progress,
        report_out_of_memory("try a smaller --size, or --device cpu"),
    ):
        statistics = import_host("diffusers.calibration").calibrate_pipeline(
            pipe, adapters, concepts, texts, CalibrationSettings(seed=seed or 0),
            strengths=[entry.weight / (total or 1.0) for entry in recipe.inputs], size=pixels, guidance=guidance,
            sampling_steps=paint_steps, progress=progress,
        )  # fmt: skip
    statistics.save(target)
    if not json:
        out().print(f"measured {len(statistics.modules)} layers: {target} ({size_of(target)})", markup=False)
