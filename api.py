"""Functions of the package root that work on files: merge, sweep, run, align, save; layer names of every dialect."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import torch

from .core import formats
from .core.adapter import Adapter
from .core.errors import MergeError
from .core.formats import BaseWeights
from .core.formats.hashes import sha256
from .core.layers.align import align as align_adapters
from .core.merge.engine import MergeResult
from .core.merge.methods import METHODS, MergeMethod
from .core.merge.statistics import Statistics
from .core.progress import Progress
from .core.recipes.conversion import convert
from .core.recipes.dtype_names import DTYPES, SHORT_NAMES, full_dtype_name
from .core.recipes.metadata import KEY, NOT_REPEATABLE
from .core.recipes.method_settings import (
    UNSAVED_STATISTICS,
    build_method,
    method_settings,
    takes_statistics,
    with_statistics,
)
from .core.recipes.read import read_recipe
from .core.recipes.recipe import Recipe
from .core.recipes.run import describe, merge_aligned, with_used_base
from .core.recipes.run import run as run_recipe
from .core.recipes.sweep import Sweep
from .core.recipes.sweep import sweep as sweep_aligned
from .core.recipes.text import recipe_from_data
from .hosts.calibration import KeepBase, Prompting, base_path, calibrate, load_base, why_not_measured
from .hosts.hub import cached_folder
from .hosts.loading import default_dtype
from .hosts.names import key_map, rename_for_format

PathLike = str | os.PathLike[str]
_HOST_FUNCTIONS: dict[str, Any] = {
    "key_map": key_map,
    "rename_for_format": rename_for_format,
    "find_cached": cached_folder,
}


def merge(
    loras: Sequence[Adapter | PathLike],
    method: str | MergeMethod = "lego",
    *,
    weights: Sequence[float] | None = None,
    text_encoder_weights: Sequence[float] | None = None,
    module_weights: Mapping[str, float] | None = None,
    normalize: bool = False,
    cap: float | None = None,
    equalize: float = 0.0,
    convert_rank: int | None = None,
    dtype: str | torch.dtype | None = None,
    format: str | None = None,
    reader: str | None = None,
    device: torch.device | str = "cpu",
    base: Any = None,
    keep_base: KeepBase | None = None,
    words: Sequence[Sequence[str]] = (),
    texts: Sequence[Sequence[str]] = (),
    instructions: Sequence[str] = (),
    tokenizer: Any = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeResult:
    """Merge LoRAs of any ranks, dtypes and file formats into one.

    ::

        result = legomole.merge(["style.safetensors", "subject.safetensors"], "lego", rank=16, weights=[0.8, 1.2])
        print(result.report.text())
        legomole.save(result, "both.safetensors")

    Args:
        loras: Paths of LoRA files or PEFT folders, or adapters (see `load`). The recipe names the file an adapter was
            loaded from, also if the adapter was changed since.
        method: A name in ``METHODS``, or an instance of a method.
        weights: One finite number per LoRA; default 1. A negative one subtracts.
        text_encoder_weights: Weights of the text encoder modules; default `weights`.
        module_weights: Pattern of module names, or name of a part of the model -> factor on the weights of matching
            modules, e.g. ``{"*attn2*": 0.5, "text-encoder": 0}``, for every LoRA that has some; see docs/recipes.md.
        normalize: Divide the weights by the sum of their magnitudes.
        cap: Lower the singular values of every LoRA in each layer to this many times their median, e.g. 8. Default: no.
        equalize: Share, 0 .. 1, by which the loudness of the LoRAs is brought together.
        convert_rank: Rank at which LoHa, LoKr and full differences are approximated; default: refuse LoHa and LoKr, and
            sum full differences exactly.
        dtype: Dtype of the result, e.g. ``"float16"`` or ``"fp16"``; default the widest of the inputs'.
        format: File format of the result, a name in ``FORMATS``; default that of the first LoRA.
        reader: Program that shall read the result and decides the layers' names: ``"comfy"``, ``"diffusers"``,
            ``"kohya"`` or ``"peft"``; default that of `format`, else the LoRAs' own names where they agree, and
            ComfyUI's where they do not.
        device: Device to compute on, e.g. ``"cpu"`` or ``"cuda"``.
        base: The base model: a diffusers pipeline, a transformers model, or the path of either. Its layers are measured
            first, see `hosts.calibration.calibrate`, and the merge changes little where no LoRA is asked for. DoRA
            needs the path for the weights, together with a `convert_rank`; there a checkpoint is enough.
        keep_base: ``"light"``, ``"thorough"`` (full statistics: gigabytes for large models), or ``"off"``. Default:
            ``"light"`` for a model that can be run.
        words: Pipelines: per LoRA, the words that name its concept in a prompt; default those in its file.
        texts: Language models: per LoRA, a few texts it is for.
        instructions: Language models: per LoRA, the instruction of its task, in place of texts.
        tokenizer: Language models: the tokenizer, unless `base` is a path.
        progress: Called with (modules merged, modules in all, name of the last one), and before that, with `base`, with
            (passes done, passes in all, description). It may raise an exception to cancel.
        **settings: Hyperparameters of a method given by name, e.g. ``rank=16``, ``rank="95%"``, ``density=0.3``;
            ``statistics`` as a path or as `Statistics`.

    Returns:
        The merged adapter, whose metadata holds the recipe, and the report.

    Raises:
        FormatError: A file that cannot be read.
        MergeError: LoRAs that do not fit together, or arguments that do not fit the LoRAs.
        RecipeError: An unknown method or setting, or a value of the wrong type.
    """
    inputs = _recipe_inputs(loras, weights, text_encoder_weights)
    weights_of, obstacle = _opened(base)
    if keep_base not in (None, "off") and (base is None or obstacle):
        raise MergeError("keep_base needs a base model that can be run.", found=obstacle or "no base model")
    notes = [obstacle] if obstacle and keep_base is None else []
    recipe = recipe_from_data(
        {
            "method": method if isinstance(method, str) else _method_name(method),
            "settings": _recipe_settings(method, settings),
            "inputs": inputs,
            "module_weights": dict(module_weights or {}),
            "normalize": normalize,
            "cap": cap,
            "equalize": equalize,
            "dtype": None if dtype is None else str(dtype),
            "format": format,
            "reader": reader,
            "convert_rank": convert_rank,
            "base": None if weights_of is None else str(weights_of.path),
        }
    )
    in_memory = any(isinstance(lora, Adapter) for lora in loras) or not isinstance(method, str)
    if (
        not in_memory
        and (base is None or obstacle or keep_base == "off")
        and not isinstance(settings.get("statistics"), Statistics)
    ):
        return run_recipe(recipe, device=device, progress=progress, notes=notes, **_HOST_FUNCTIONS)
    adapters = _loaded(loras, convert_rank, weights_of)
    recipe = with_used_base(recipe, weights_of)
    measured = None
    if base is not None and not obstacle and keep_base != "off":
        prompting = Prompting(words, texts=texts, instructions=instructions)
        measured, path, note = _calibrate(base, adapters, prompting, keep_base or "light", tokenizer, device, progress)
        notes += [note] if note else []
        given = settings.get("statistics") if isinstance(method, str) else getattr(method, "statistics", None)
        if measured is not None and given is None and takes_statistics(recipe.method):
            if isinstance(method, str):
                settings["statistics"] = measured if path is None else str(path)
            else:
                method = dataclasses.replace(cast(Any, method), statistics=measured)
            recipe = with_statistics(recipe, path)
    chosen = method if not isinstance(method, str) else build_method(method, _loaded_statistics(settings, adapters))
    if isinstance(statistics := recipe.settings.get("statistics"), str) and statistics != UNSAVED_STATISTICS:
        recipe = recipe.model_copy(update={"statistics_sha256": sha256(Path(statistics))})
    aligned = align(adapters)
    renamed = any(before is not after for before, after in zip(adapters, aligned, strict=True))
    result = merge_aligned(recipe, chosen, aligned, device=device, progress=progress, statistics=measured)
    if obstacles := _obstacles(recipe, chosen, adapters):
        notes.append(f"{NOT_REPEATABLE}: {'; '.join(obstacles)}")
    return describe(recipe, chosen, result, adapters, renamed=renamed, rename_for_format=rename_for_format, notes=notes)


def sweep(
    loras: Sequence[Adapter | PathLike],
    *,
    weights: Sequence[float] | None = None,
    text_encoder_weights: Sequence[float] | None = None,
    rank: str | int = "1x",
    cap: float | None = None,
    equalize: float = 0.0,
    convert_rank: int | None = None,
    device: torch.device | str = "cpu",
    base: Any = None,
    words: Sequence[Sequence[str]] = (),
    texts: Sequence[Sequence[str]] = (),
    instructions: Sequence[str] = (),
    tokenizer: Any = None,
    statistics: Statistics | PathLike | None = None,
    progress: Progress | None = None,
) -> Sweep:
    """Rank merges of LoRAs (methods, ranks and strengths) by what they are predicted to keep. Nothing is merged.

    ::

        table = legomole.sweep(loras, base="sd15", words=[["ember style"], ["heart"]])
        print(table.text())

    Args:
        loras, weights, text_encoder_weights, cap, equalize, convert_rank, device: See `merge`.
        rank: Rank of the merges; calibrated ones are tried at twice that rank too.
        base, words, texts, instructions, tokenizer: The base model, which is measured (light statistics), see `merge`.
        statistics: Statistics measured before with these LoRAs, or their file, in place of `base`.
        progress: See `merge`.

    Returns:
        The candidates, the best first.

    Raises:
        FormatError: A file that cannot be read.
        MergeError: See `merge`; or there is neither a base model that can be measured nor statistics.
    """
    inputs = _recipe_inputs(loras, weights, text_encoder_weights)
    settings = {"settings": {"rank": rank}, "cap": cap, "equalize": equalize, "convert_rank": convert_rank}
    recipe = recipe_from_data({"method": "lego", "inputs": inputs, **settings})
    weights_of, obstacle = _opened(base)
    obstacle = "neither base nor statistics" if base is None else obstacle
    adapters = _loaded(loras, convert_rank, weights_of)
    if statistics is None and not obstacle:
        prompting = Prompting(words, texts=texts, instructions=instructions)
        statistics, _, obstacle = _calibrate(base, adapters, prompting, "light", tokenizer, device, progress)
    if statistics is None:
        raise MergeError(
            "A sweep needs a base model that can be measured, or statistics.",
            found=obstacle,
            remedy='pass base="FOLDER" with words (or texts) for every LoRA, or statistics="FILE"',
        )
    measured = _loaded_statistics({"statistics": statistics}, adapters)["statistics"]
    return sweep_aligned(recipe, align(adapters), measured, device=device, progress=progress)


def _opened(base: Any) -> tuple[BaseWeights | None, str]:
    """The weights of a base model given by path or name, ``None`` for another one; and why it cannot be measured."""
    weights = BaseWeights(base_path(os.fspath(base))) if isinstance(base, (str, os.PathLike)) else None
    return weights, why_not_measured(base if weights is None else weights.path)


def _loaded(loras: Sequence[Adapter | PathLike], convert_rank: int | None, base: BaseWeights | None) -> list[Adapter]:
    """The adapters; files are loaded, see `formats.load`."""
    return [
        lora if isinstance(lora, Adapter) else formats.load(Path(lora), convert_rank=convert_rank, base=base)
        for lora in loras
    ]


def _calibrate(
    base: Any,
    adapters: Sequence[Adapter],
    prompting: Prompting,
    mode: Literal["light", "thorough"],
    tokenizer: Any,
    device: torch.device | str,
    progress: Progress | None,
) -> tuple[Statistics | None, Path | None, str]:
    """Measure on a base model: the statistics, their file in the cache, and why nothing was measured."""
    if isinstance(base, (str, os.PathLike)):
        base, tokenizer = load_base(os.fspath(base), device=device, dtype=getattr(torch, default_dtype(device)))
    found = calibrate(base, adapters, prompting, mode=mode, tokenizer=tokenizer, progress=progress)
    statistics = None if found.statistics is None else found.statistics.of(adapters)
    return statistics, found.path, found.note


def run(
    recipe: Recipe | PathLike,
    *,
    folder: PathLike | None = None,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
) -> MergeResult:
    """Run a recipe; gives the bytes that the command line gives.

    Args:
        recipe: A recipe, or the path of a recipe file (.yaml, .toml) or of a merged file to repeat.
        folder: Base of the recipe's relative paths; default the folder of the file, or the working directory.
        device: Device to compute on.
        progress: See `merge`.

    Raises:
        RecipeError: A broken recipe, or an input that differs from the one it was written for.
        FormatError: A file that cannot be read.
        MergeError: Inputs that cannot be merged.
    """
    if not isinstance(recipe, Recipe):
        path = Path(recipe)
        recipe, folder = read_recipe(path), path.parent if folder is None else folder
    return run_recipe(
        recipe,
        folder=Path(folder or ""),
        device=device,
        progress=progress,
        **_HOST_FUNCTIONS,
    )


def align(adapters: Sequence[Adapter]) -> list[Adapter]:
    """Return adapters under common module names; diffusers translates between dialects.

    Args:
        adapters: Adapters of one base model, from files of any format.

    Raises:
        MergeError: Adapters without a common layer, or diffusers is needed and not installed.
    """
    return align_adapters(adapters, key_map=key_map)


def save(
    lora: Adapter | MergeResult, path: PathLike, *, format: str | None = None, dtype: str | torch.dtype | None = None
) -> Path:
    """Write a LoRA to a file (or to a PEFT folder), atomically.

    Args:
        lora: A result of `merge`, whose file says how it was made, or an adapter. If the adapter is a loaded merge,
            another format or dtype becomes a further step of its recipe.
        path: File or folder; ``.safetensors`` is appended to a file name without it.
        format: A name in ``FORMATS``, for adapters; default the format that the adapter came in.
        dtype: Dtype of the tensors, for adapters, e.g. ``"bfloat16"`` or ``"bf16"``; default their own.

    Returns:
        The path written.

    Raises:
        SaveError: Module names that the format cannot express, values that overflow `dtype`, or a path that cannot be
            written. An existing file stays as it was.
        MergeError: Format or dtype given for a merge, whose recipe would not repeat the file; or layers without a name
            in the format.
    """
    if isinstance(lora, MergeResult):
        if KEY in lora.adapter.metadata and (format is not None or dtype is not None):
            raise MergeError(
                "Format and dtype of a merged file are part of its recipe.",
                found=f"format {format}, dtype {dtype}",
                remedy="pass them to merge(..): merge(loras, format=.., dtype=..)",
            )
        lora = lora.adapter
    if format is not None or dtype is not None:
        lora = convert(lora, format, _torch_dtype(dtype), rename_for_format=rename_for_format if format else None)
    return formats.save(lora, Path(path), format=format)


def _recipe_inputs(
    loras: Sequence[Adapter | PathLike],
    weights: Sequence[float] | None,
    text_encoder_weights: Sequence[float] | None,
) -> list[dict[str, Any]]:
    """The inputs of a recipe.

    Raises:
        MergeError: No LoRAs, or another number of weights.
    """
    if not loras:
        raise MergeError("There is nothing to merge.", expected="at least one LoRA", found="none")
    for name, values in (("weights", weights), ("text_encoder_weights", text_encoder_weights)):
        if values is not None and len(values) != len(loras):
            raise MergeError("Every LoRA needs one weight.", module=name, expected=len(loras), found=len(values))
    return [
        {
            **_recipe_input(lora),
            "weight": 1.0 if weights is None else float(weights[i]),
            "text_encoder_weight": None if text_encoder_weights is None else float(text_encoder_weights[i]),
        }
        for i, lora in enumerate(loras)
    ]


def _recipe_input(lora: Adapter | PathLike) -> dict[str, Any]:
    """The fields of a recipe's input that say what is merged."""
    if not isinstance(lora, Adapter):
        return {"path": os.fspath(lora)}
    source = lora.source
    return {
        "path": source.path or lora.label,
        "sha256": source.sha256,
        "convert_rank": source.convert_rank or None,
        "in_memory": not source.sha256,
    }


def _obstacles(recipe: Recipe, method: MergeMethod, adapters: Sequence[Adapter]) -> list[str]:
    """Why `run` cannot repeat a merge from its recipe."""
    in_memory = [adapter.label for adapter in adapters if not adapter.source.sha256]
    obstacles = [f"{label} was no file but an adapter in memory" for label in in_memory]
    statistics_path = recipe.settings.get("statistics", UNSAVED_STATISTICS)
    if getattr(method, "statistics", None) is not None and statistics_path == UNSAVED_STATISTICS:
        obstacles.append("the statistics were not given as a file")
    return obstacles


def _torch_dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """A dtype by name.

    Raises:
        MergeError: An unknown name.
    """
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    name = full_dtype_name(dtype)
    if name not in DTYPES:
        raise MergeError("There is no such dtype.", expected=", ".join((*DTYPES, *SHORT_NAMES)), found=dtype)
    return getattr(torch, name)


def _method_name(method: MergeMethod) -> str:
    return next((name for name, row in METHODS.items() if isinstance(method, row)), type(method).__name__)


def _recipe_settings(method: str | MergeMethod, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as a recipe stores them.

    Raises:
        MergeError: Settings beside an instance of a method.
    """
    if isinstance(method, str):
        stored = {key: value for key, value in settings.items() if not isinstance(value, Statistics)}
        return {key: os.fspath(value) if isinstance(value, os.PathLike) else value for key, value in stored.items()}
    if settings:
        raise MergeError(
            "Settings are for a method that is given by name.",
            expected=f'merge(loras, "lego", {next(iter(settings))}=..)',
            found=f"an instance of {type(method).__name__}, and {', '.join(settings)}",
        )
    return method_settings(method)


def _loaded_statistics(settings: Mapping[str, Any], adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The settings with statistics as `Statistics`, whose positions refer to these adapters."""
    statistics = settings.get("statistics")
    if statistics is None:
        return dict(settings)
    if not isinstance(statistics, Statistics):
        statistics = Statistics.load(statistics)
    return {**settings, "statistics": statistics.of(adapters)}
