"""What `merge --calibrate` does before it merges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .console import progress_bar
from .gates_input import parse_size, parse_words, read_lines
from .machine import host
from .options import check_free


def measure(
    pipeline: str,
    inputs: Sequence[Mapping[str, Any]],
    folder: Path,
    words: Sequence[str],
    prompts: Path | None,
    target: Path,
    *,
    size: str | None,
    guidance: float | None,
    seed: int | None,
    convert_rank: int | None,
    device: str,
    overwrite: bool,
    json: bool,
) -> None:
    """Measure the statistics of a merge and write them to `target`.

    Args:
        pipeline: Folder or name of the diffusers pipeline.
        inputs: The recipe's inputs. folder: Where their paths start.
        words: Per LoRA, its words with commas between. prompts: File with one prompt a line.
        target: File to write. size, guidance: As typed. seed: Of everything drawn.
        convert_rank, device, overwrite, json: As for the merge.
    """
    from ..core.calibration import CalibrationSettings
    from ..core.formats import load

    concepts = parse_words(words, len(inputs))
    pixels = None if size is None else parse_size(size)
    texts = [] if prompts is None else read_lines(prompts)
    check_free(target, overwrite=overwrite)
    adapters = [load(folder / entry["path"], convert_rank=convert_rank) for entry in inputs]
    pipe = host("pipeline_training").load_pipeline(pipeline, device=device)
    with progress_bar("measuring", quiet=json, telling=True) as progress:
        statistics = host("pipeline_calibration").calibrate_pipeline(
            pipe, adapters, concepts, texts, CalibrationSettings(seed=seed or 0),
            strengths=[entry.get("weight", 1.0) for entry in inputs], size=pixels, guidance=guidance, progress=progress,
        )  # fmt: skip
    statistics.save(target)
