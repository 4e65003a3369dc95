"""Calibrate a merge on its base model, for `legomole merge --base`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer

from ..hosts.hub import cached_folder
from ..hosts.loading import default_dtype
from .arguments import parse_per_lora
from .console import out, progress_bar
from .environment import import_host
from .gates_input import parse_size, read_lines, read_texts, split_words
from .options import check_free, size_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..core.recipes.recipe import Recipe
    from ..hosts.calibration import Prompting


@dataclass(frozen=True)
class BaseOptions:
    """Options on the base model, as typed.

    Args:
        base: Folder of the model.
        keep: Mode of the measurement.
        words, texts, instruction: ``[N:]VALUE``, see `parse_per_lora`.
        prompts: File with one prompt per line.
        size: Picture size.
        seed: Random seed.
    """

    base: str
    keep: Literal["light", "thorough"]
    words: Sequence[str]
    texts: Sequence[str]
    instruction: Sequence[str]
    prompts: Path | None
    size: str | None
    seed: int | None

    def prompting(self, loras: int) -> Prompting:
        """What the model is shown, read from the options and files."""
        from ..hosts.calibration import Prompting

        texts = parse_per_lora(self.texts, loras, "--texts")
        return Prompting(
            [split_words(text) for text in parse_per_lora(self.words, loras, "--words")] if self.words else (),
            [] if self.prompts is None else read_lines(self.prompts),
            None if self.size is None else parse_size(self.size),
            [_read_plain_texts(Path(path)) if path else [] for path in texts] if self.texts else (),
            parse_per_lora(self.instruction, loras, "--instruction") if self.instruction else (),
        )


def calibrate_merge(
    options: BaseOptions, recipe: Recipe, folder: Path, target: Path | None, *, device: str, overwrite: bool, json: bool
) -> tuple[Any, Path | None, str]:
    """Measure the statistics of a merge on its base model, or find them in the cache.

    Args:
        options: See `BaseOptions`.
        recipe: The merge; its LoRAs are measured.
        folder: Base of the recipe's relative paths.
        target: File to write the statistics to, too.
        device, overwrite, json: Options as typed.

    Returns:
        The statistics, their file (``None`` if they are in memory only), and why nothing was measured (``""``
        otherwise, and then there are statistics).

    Raises:
        LegoMoleError: Out of memory, or an error of `hosts.calibration.calibrate`.
    """
    import torch

    from ..core.formats import BaseWeights, load
    from ..core.memory import report_out_of_memory
    from ..core.recipes.run import input_paths
    from ..hosts.calibration import calibrate, load_base

    prompting = options.prompting(len(recipe.inputs))
    if target is not None:
        check_free(target, overwrite=overwrite)
    weights = BaseWeights(Path(options.base))
    adapters = [
        load(path, convert_rank=entry.convert_rank or recipe.convert_rank, base=weights)
        for entry, path in zip(recipe.inputs, input_paths(recipe, folder, cached_folder), strict=True)
    ]
    import_host("api")
    base, tokenizer = load_base(options.base, device=device, dtype=getattr(torch, default_dtype(device)))
    with (
        progress_bar("measuring", quiet=json, show_step=True) as progress,
        report_out_of_memory("try a smaller --size, --keep-base light, or --device cpu"),
    ):
        calibration = calibrate(
            base, adapters, prompting, mode=options.keep, tokenizer=tokenizer, seed=options.seed or 0, progress=progress
        )
    statistics, path = calibration.statistics, calibration.path
    if statistics is None:
        return None, None, calibration.note
    if target is not None:
        statistics.save(target)
        path = target
    if not json:
        where = "" if path is None or not calibration.measured else f": {path} ({size_of(path)})"
        found = "measured" if calibration.measured else "found the statistics of"
        out().print(f"{found} {len(statistics.modules)} layers of the base model{where}", markup=False)
    return statistics, path, ""


def _read_plain_texts(path: Path) -> list[str]:
    """Read a file with one text per line, or JSON lines as for `train-gates` (prompt and completion are joined)."""
    if path.suffix == ".jsonl":
        return ["".join(text) if isinstance(text, tuple) else text for text in read_texts(path)]
    texts = [line.strip() for line in read_lines(path) if line.strip()]
    if not texts:
        raise typer.BadParameter(f"--texts {path}: the file has no lines.")
    return texts
