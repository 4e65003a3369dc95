"""Calibration of a merge on its base model: a diffusers pipeline, or a language model of transformers.

A merge that keeps the base model needs statistics (see `core.merge.statistics`). They are measured with the LoRAs at
strength 1, so they serve every rank, method and weight, and are kept in a cache folder for the next merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..core.errors import FormatError, MergeError, name_some
from ..core.merge.statistics_cache import cache_key, cached_path, load_cached, store_cached
from .api import kind_of_folder, kind_of_model
from .hub import cached_folder
from .loading import import_host

if TYPE_CHECKING:
    import torch

    from ..core.adapter import Adapter
    from ..core.merge.statistics import Statistics
    from ..core.progress import Progress

KeepBase = Literal["off", "light", "thorough"]


@dataclass(frozen=True, eq=False)
class Calibration:
    """Result of `calibrate`.

    Args:
        statistics: The statistics; ``None`` if nothing could be measured.
        path: Their file in the cache, if they are there.
        note: Why nothing was measured; ``""`` otherwise.
        measured: Whether they were measured now, not found in the cache.
    """

    statistics: Statistics | None
    path: Path | None = None
    note: str = ""
    measured: bool = False


@dataclass(frozen=True)
class Prompting:
    """What a base model is shown to measure LoRAs.

    Args:
        words: Pipelines: per LoRA, the words that name it in a prompt; an empty list takes those in its file.
        prompts: Pipelines: prompts to measure on; missing kinds are made from the words.
        size: Pipelines: height and width in pixels.
        texts: Language models: per LoRA, a few texts it is for.
        instructions: Language models: per LoRA, the instruction of its task, for LoRAs without texts.
    """

    words: Sequence[Sequence[str]] = ()
    prompts: Sequence[str] = ()
    size: tuple[int, int] | None = None
    texts: Sequence[Sequence[str]] = ()
    instructions: Sequence[str] = ()


def base_path(base: str | Path) -> Path:
    """Path of a base model given as a file, a folder, or a name in the local Hugging Face cache.

    Raises:
        FormatError: The cache has no such name.
    """
    return Path(base) if Path(base).exists() else cached_folder(str(base), "base model")


def why_not_measured(base: Any) -> str:
    """Why a base model cannot be measured; ``""`` if it can.

    Args:
        base: A loaded model, or a path. A checkpoint, or a folder of one component, has weights but cannot be run.
    """
    if not isinstance(base, (str, Path)):
        return ""
    try:
        kind_of_folder(base)
    except FormatError as error:
        return f"not calibrated on the base model: {base} cannot be run ({error.problem.rstrip('.')})"
    return ""


def load_base(base: str | Path, *, device: torch.device | str = "cpu", dtype: torch.dtype) -> tuple[Any, Any]:
    """Load a pipeline, or a language model with its tokenizer, by folder or by name in the local Hugging Face cache.

    Returns:
        The model, and its tokenizer or ``None``.

    Raises:
        FormatError: There is no such folder or name, or it is damaged.
        MergeError: Libraries that are not installed.
    """
    if kind_of_folder(base) == "pipeline":
        load = import_host("diffusers.training", "diffusers").load_pipeline
        return load(str(base), device=str(device), dtype=dtype), None
    return import_host("transformers.training", "peft").load_model(str(base), device=str(device), dtype=dtype)


def calibrate(
    base: Any,
    adapters: Sequence[Adapter],
    prompting: Prompting,
    *,
    mode: Literal["light", "thorough"] = "light",
    tokenizer: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Calibration:
    """Measure statistics of LoRAs on their base model, or find them in the cache.

    Without words (or texts) for every LoRA nothing is measured, and the result says why.

    Args:
        base: A diffusers pipeline or a transformers model; it is left unchanged.
        adapters: The adapters of the merge, as loaded.
        prompting: What the model is shown.
        mode: See `CalibrationSettings`.
        tokenizer: Of a language model.
        seed: Random seed.
        progress: Called with (passes done, passes in all, description). May raise an exception to cancel; then nothing
            is stored.

    Raises:
        MergeError: The adapters are for another model, or prompting is for another kind of model.
    """
    from ..core.digest import identity
    from ..core.train.measure import CalibrationSettings
    from .base_model import base_model_name, weights_digest

    settings = CalibrationSettings(mode=mode, seed=seed)
    kind = kind_of_model(base)
    shown: list[Any]
    if kind == "pipeline":
        _refuse_arguments("a diffusers pipeline", texts=prompting.texts, instructions=prompting.instructions)
        shown = concept_words(adapters, prompting.words)
        what, model = "words", import_host("diffusers.mixing", "diffusers").denoising_model(base)
    else:
        _refuse_arguments("a language model", words=prompting.words, prompts=prompting.prompts, size=prompting.size)
        instructed = import_host("transformers.calibration", "peft").instructed_texts
        texts, instructions = prompting.texts or [[]] * len(adapters), prompting.instructions or [""] * len(adapters)
        _check_count("texts", texts, adapters)
        _check_count("instructions", instructions, adapters)
        shown = [list(t) or (instructed(i) if i else []) for t, i in zip(texts, instructions, strict=True)]
        what, model = "texts", base
    if missing := [adapter.label for adapter, part in zip(adapters, shown, strict=True) if not part]:
        return Calibration(None, note=f"not calibrated on the base model: no {what} for {name_some(missing)}")
    hashes = [*map(identity, adapters)]
    key = cache_key([
        _VERSION, hashes, shown, list(prompting.prompts), prompting.size, base_model_name(model),
        weights_digest(model), settings.model_dump(),
    ])  # fmt: skip
    cached = load_cached(key)
    if cached is not None:
        return Calibration(cached, cached_path(key))
    if kind == "pipeline":
        measure = import_host("diffusers.calibration", "diffusers").calibrate_pipeline
        statistics = measure(
            base, adapters, shown, prompting.prompts, settings, size=prompting.size, progress=progress
        )  # fmt: skip
    else:
        measure = import_host("transformers.calibration", "peft").calibrate_language_model
        statistics = measure(base, adapters, shown, tokenizer, settings, progress=progress)
    return Calibration(statistics, store_cached(key, statistics), measured=True)


_VERSION = 1  # of what the settings do not say: another number measures again


def concept_words(adapters: Sequence[Adapter], words: Sequence[Sequence[str]] = ()) -> list[list[str]]:
    """Per adapter, the words that name its concept: the given ones, or else those in its file's metadata.

    Words that two files have in common tell neither apart and are left out.

    Raises:
        MergeError: Words for another number of adapters.
    """
    from ..core.formats.file_info import file_info
    from ..core.train.prompts import distinct_words

    given = [[word.strip() for word in part if word.strip()] for part in words] or [[] for _ in adapters]
    _check_count("words", given, adapters)
    found = [file_info(adapter.metadata).words for adapter in adapters]
    return distinct_words(given, found)


def _check_count(name: str, values: Sequence[object], adapters: Sequence[Adapter]) -> None:
    if len(values) != len(adapters):
        raise MergeError(f"Every LoRA needs its own {name}.", expected=f"{len(adapters)} lists", found=len(values))


def _refuse_arguments(kind: str, **arguments: object) -> None:
    if wrong := [name for name, value in arguments.items() if value]:
        raise MergeError(f"These arguments are not for {kind}.", found=", ".join(wrong))
