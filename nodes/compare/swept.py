"""A sweep over the connected LoRAs: statistics from Calibrate or measured here, and the ranking as a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...core.errors import MergeError
from ...core.merge.statistics import Statistics
from ...core.progress import Progress
from ...core.recipes.recipe import Input, Recipe
from ...core.recipes.sweep import Sweep, sweep
from ...core.survey.sweep_page import write_sweep
from ..comfy import folders
from ..comfy.merge_calibration import calibrate_merge
from ..graph_lora import GraphLora, require_all_steps
from ..merge.read_cache import read
from ..words import words_of_loras


def sweep_loras(
    loras: Sequence[GraphLora],
    model: Any,
    clip: Any,
    statistics: Statistics | None,
    *,
    words: str,
    rank: str,
    progress: Progress,
) -> tuple[Sweep, Statistics, str]:
    """Rank merges of LoRAs by prediction, and write the ranking as a page to ComfyUI's output folder.

    Args:
        loras: The LoRAs, with their strengths.
        model, clip: The base model, without the LoRAs.
        statistics: Statistics of Calibrate; ``None`` measures light ones, see `calibrate_merge`.
        words: One line of words per LoRA, for the measurement.
        rank: Rank of the candidates.
        progress: Called during measurement and sweep. May raise an exception to cancel.

    Returns:
        The sweep, the statistics, and the path of the page.

    Raises:
        MergeError: No LoRAs, none with words, or LoRAs and statistics that do not fit.
        FormatError: A file that cannot be read.
    """
    require_all_steps(loras)
    if not loras:
        raise MergeError("There is nothing to sweep.", expected="at least one LoRA", found="none connected")
    concepts = words_of_loras(words, loras)
    page = folders.new_path("legomole/sweep", folders.OUTPUT)
    loaded = read(loras, model, clip).hashed()  # statistics know their LoRAs by hash
    note = ""
    if statistics is None:
        statistics, note = calibrate_merge(loras, loaded, concepts, model, clip, "light", progress)
    if statistics is None:
        raise MergeError(
            "A sweep needs statistics of the model, and none could be measured.",
            found=note,
            remedy="write the words of every LoRA on this node or on Load LoRA, or connect Calibrate",
        )
    statistics = statistics.of(loaded.adapters)
    inputs = [
        Input(path=lora.label, weight=lora.strength_model, text_encoder_weight=lora.strength_clip) for lora in loras
    ]
    swept = sweep(
        Recipe(method="lego", settings={"rank": rank}, inputs=inputs),
        loaded.adapters,
        statistics,
        progress=lambda done, total, _: progress(done, total, "predicting merges"),
    )
    write_sweep(swept, page)
    return swept, statistics, str(page)
