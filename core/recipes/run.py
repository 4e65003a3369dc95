"""Run a recipe: load the inputs, align them, merge them, and describe the result in its metadata."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import torch

from .. import __version__
from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import MergeError, name_some
from ..formats import BaseWeights, hashes, load, weight_files
from ..formats.file_changes import raise_if_changed
from ..layers.align import KeyMapResolver, align
from ..layers.resolve import copies
from ..merge.cache import GramCache
from ..merge.engine import BatchRunner, MergeResult, merge
from ..merge.findings.names import refuse_noise_halves
from ..merge.methods import MergeMethod
from ..merge.statistics import Statistics
from ..merge.weights import adapters_matching
from ..progress import Progress
from .conversion import repeat_conversion
from .metadata import disagreements, file_metadata
from .method_settings import build_method, method_settings, takes_statistics
from .output import RenameForFormat, name_output
from .recipe import HUB_PREFIX, Input, Recipe, RecipeError
from .remote import RemoteInputs, RemoteRunner


def run(
    recipe: Recipe,
    *,
    folder: Path = Path(),
    key_map: KeyMapResolver | None = None,
    rename_for_format: RenameForFormat | None = None,
    find_cached: Callable[[str], Path] | None = None,
    device: torch.device | str = "cpu",
    loading: Progress | None = None,
    progress: Progress | None = None,
    remote: RemoteRunner | None = None,
    statistics: Statistics | None = None,
    notes: Sequence[str] = (),
) -> MergeResult:
    """Run a recipe whose inputs are files.

    Args:
        recipe: The merge.
        folder: Base of the recipe's relative paths.
        key_map: A host's function for inputs whose files name the same layers differently, see `align`.
        rename_for_format: The same host's function, for LoRAs of families without a table.
        find_cached: A host's function: name of an adapter -> its folder in the local Hugging Face cache.
        device: Device to compute on, see `merge`.
        loading: Called with (inputs loaded, inputs in all, path of the last one).
        progress: See `merge`.
        remote: A host's function that merges batches on other machines, where the inputs are opened again.
        statistics: Measured with the inputs; for the method, if the recipe names no file of statistics.
        notes: Notes for the report.

    Returns:
        The merged adapter and the report. The adapter's metadata holds recipe and report; its source names the format
        to save it in.

    Raises:
        RecipeError: An input differs from the file the recipe was written for, or was no file, or the method's settings
            are wrong.
        FormatError: An input cannot be read.
        MergeError: The inputs cannot be merged.
    """
    if "statistics" not in recipe.settings and statistics is None:  # report wrong settings before large files are read
        build_method(recipe.method, recipe.settings)
    paths = input_paths(recipe, folder, find_cached)
    statistics_path = folder / str(recipe.settings["statistics"]) if "statistics" in recipe.settings else None
    base: BaseWeights | None = None
    if recipe.base is not None:
        base = BaseWeights(folder / recipe.base)
        if recipe.base_fingerprint:
            _check_hash(base.path, recipe.base_fingerprint, base.fingerprint(), "base_fingerprint")
    files = paths if statistics_path is None else [*paths, statistics_path]
    with raise_if_changed(files), hashes.hash_in_background([weight_files(path) for path in paths]) as pending_hashes:
        adapters: list[Adapter] = []
        for entry, path in zip(recipe.inputs, paths, strict=True):
            adapters.append(_load(entry, path, recipe.convert_rank, base))
            if loading is not None:
                loading(len(adapters), len(recipe.inputs), entry.path)
        recipe = with_used_base(recipe, base)
        if recipe.base is not None and remote is not None:
            raise RecipeError("A merge of DoRA with a base model runs on this machine only.", found=recipe.base)
        # where only the metadata needs the hashes, they are awaited after the merge
        needs_hashes = any(x is not None for x in (statistics_path, statistics, remote))
        hashes_first = needs_hashes or any(entry.sha256 for entry in recipe.inputs)
        if hashes_first:
            adapters = _with_hashes(recipe, paths, adapters, pending_hashes)
        if statistics is not None:
            statistics = statistics.of(adapters)
        if statistics_path is not None:
            statistics = Statistics.load(statistics_path).of(adapters)
            sha256 = hashes.sha256(statistics_path)
            _check_hash(statistics_path, recipe.statistics_sha256, sha256)
            recipe = recipe.model_copy(update={"statistics_sha256": sha256})
        used = {"statistics": statistics} if statistics is not None and takes_statistics(recipe.method) else {}
        method = build_method(recipe.method, {**recipe.settings, **used})
        aligned = align(adapters, key_map=key_map)
        renamed = any(before is not after for before, after in zip(adapters, aligned, strict=True))
        run_batches: BatchRunner | None = None
        if remote is not None:
            ranks = [_convert_rank(entry, recipe.convert_rank) for entry in recipe.inputs]
            run_batches = partial(remote, RemoteInputs.of(adapters, [*map(Path.absolute, paths)], ranks, key_map))
        result = merge_aligned(
            recipe, method, aligned, device=device, progress=progress, run_batches=run_batches, statistics=statistics
        )
        if not hashes_first:
            adapters = _with_hashes(recipe, paths, adapters, pending_hashes)
    merge_only = recipe.model_copy(update={"conversions": []})
    result = describe(
        merge_only, method, result, adapters, renamed=renamed, rename_for_format=rename_for_format, notes=notes
    )
    for step in recipe.conversions:
        result = dataclasses.replace(result, adapter=repeat_conversion(result.adapter, step, rename_for_format))
    return result


def merge_aligned(
    recipe: Recipe,
    method: MergeMethod,
    adapters: Sequence[Adapter],
    *,
    device: torch.device | str = "cpu",
    progress: Progress | None = None,
    run_batches: BatchRunner | None = None,
    cache: GramCache | None = None,
    statistics: Statistics | None = None,
) -> MergeResult:
    """Merge the inputs of a recipe, given as adapters under common module names.

    Args:
        recipe: Weights, module weights, cap, equalize and dtype are taken from here.
        method: The recipe's method.
        adapters: The recipe's inputs, in order.
        device, progress, run_batches, cache, statistics: See `merge`.

    Raises:
        MergeError: LoRAs for both noise halves of Wan 2.2; and see `merge`.
    """
    weights_of = [(entry.weight, entry.text_encoder_weight) for entry in recipe.inputs]
    refuse_noise_halves([adapter for adapter, given in zip(adapters, weights_of, strict=True) if any(given)])
    return merge(
        adapters,
        method,
        [entry.weight for entry in recipe.inputs],
        text_encoder_weights=[
            entry.weight if entry.text_encoder_weight is None else entry.text_encoder_weight for entry in recipe.inputs
        ],
        module_weights=_module_weights(recipe, adapters),
        normalize=recipe.normalize,
        cap=recipe.cap,
        equalize=recipe.equalize,
        dtype=None if recipe.dtype is None else getattr(torch, recipe.dtype),
        device=device,
        progress=progress,
        each=run_batches,
        cache=cache,
        statistics=statistics,
    )


def describe(
    recipe: Recipe,
    method: MergeMethod,
    result: MergeResult,
    inputs: Sequence[Adapter],
    *,
    renamed: bool,
    rename_for_format: RenameForFormat | None = None,
    notes: Sequence[str] = (),
    named: bool = False,
) -> MergeResult:
    """Return a merge result whose adapter holds recipe and report in its metadata, and its file format in its source.

    Args:
        recipe: What was merged.
        method: The recipe's method; its settings are stored with their defaults.
        result: Result of the merge.
        inputs: The inputs as loaded, with the hashes of their files.
        renamed: Whether aligning the inputs renamed modules.
        rename_for_format, notes: See `run`.
        named: Whether the merged layers have their final names already, those of the recipe's format.
    """
    merged = result.adapter
    settings = {**method_settings(method), **{k: v for k, v in recipe.settings.items() if k == "statistics"}}
    made = recipe.model_copy(update={"legomole": __version__, "settings": settings})
    notes = [*result.report.notes, *notes, *disagreements(inputs), *copies(inputs)]
    if recipe.legomole != __version__:
        notes.append(
            f"the recipe was written by legomole {recipe.legomole}, this is {__version__}: "
            'see "Results change" in the CHANGELOG'
        )
    if named and recipe.format is not None:
        format = recipe.format
    else:
        # where only PEFT folders meet, their experts alone are renamed, see `unify_experts`
        host_names = renamed and not all(CONFIG_KEY in adapter.metadata for adapter in inputs)
        merged, format = name_output(
            merged,
            first_format=inputs[0].source.format,
            inputs=inputs,
            renamed=host_names,
            format=recipe.format,
            reader=recipe.reader,
            rename_for_format=rename_for_format,
        )
    _check_names_of_extras(merged)
    kept = sorted(set(result.adapter.extras) & set(merged.extras))
    if kept and (renamed or merged.layers != result.adapter.layers):
        notes.append(
            f"{len(kept)} tensors that are passed on keep the names of their file, unlike the layers: {name_some(kept)}"
        )
    report = dataclasses.replace(result.report, notes=tuple(notes))
    metadata = file_metadata(made, report, inputs)
    return MergeResult(dataclasses.replace(merged, metadata=metadata, source=Source(format=format)), report)


def input_paths(recipe: Recipe, folder: Path, find_cached: Callable[[str], Path] | None) -> list[Path]:
    """Return the files or folders of a recipe's inputs, see `input_path`.

    Raises:
        RecipeError: An input was an adapter in memory; or see `input_path`.
        FormatError: See the host's function.
    """
    for number, entry in enumerate(recipe.inputs, 1):
        if entry.in_memory:
            raise RecipeError(
                "An input of this recipe was no file but an adapter in memory, so the merge cannot be repeated.",
                module=f"input {number}",
                expected="a file or folder",
                found=f"{entry.path} (in_memory)",
                remedy="save the adapter and name its file in a recipe file (see legomole inspect --recipe)",
            )
    return [input_path(entry.path, folder, find_cached) for entry in recipe.inputs]


def _check_names_of_extras(merged: Adapter) -> None:
    """Raise if ComfyUI's keys that widen or replace weights are named otherwise than the merged layers."""
    moved = [key for key in merged.extras if key.endswith(".reshape_weight") and "diffusion_model." in key]
    moved = [key for key in moved if key.removesuffix(".reshape_weight") not in merged.modules]
    if moved:
        raise MergeError(
            "A LoRA widens a layer that the other LoRAs name otherwise.",
            module=name_some(moved),
            expected="layers named as in the control LoRA, diffusion_model..",
            found=f"layers such as {name_some(merged.modules, 2)}",
            remedy="merge them in ComfyUI with the model connected, or convert the others to ComfyUI's names first",
        )


def load_inputs(
    recipe: Recipe, folder: Path, find_cached: Callable[[str], Path] | None, *, verify: bool = False
) -> list[Adapter]:
    """Load the inputs of a recipe, without comparing their hashes.

    Args:
        recipe: The merge. folder, find_cached: See `run`. verify: See `load`; statistics know adapters by their hashes.

    Raises:
        RecipeError, FormatError: See `run`.
    """
    base = None if recipe.base is None else BaseWeights(folder / recipe.base)
    paths = input_paths(recipe, folder, find_cached)
    return [
        _load(entry, path, recipe.convert_rank, base, verify=verify)
        for entry, path in zip(recipe.inputs, paths, strict=True)
    ]


def input_path(path: str, folder: Path, find_cached: Callable[[str], Path] | None) -> Path:
    """Return the file or folder of a recipe's input.

    Args:
        path: Path as written in the recipe.
        folder: Base of relative paths.
        find_cached: See `run`.

    Raises:
        RecipeError: A name on the Hugging Face Hub without a host that can look it up.
        FormatError: See the host's function.
    """
    if not path.startswith(HUB_PREFIX):
        return folder / path
    if find_cached is None:
        raise RecipeError("Adapters of the Hugging Face cache are merged on the command line only.", file=path)
    return find_cached(path.removeprefix(HUB_PREFIX))


def with_used_base(recipe: Recipe, base: BaseWeights | None) -> Recipe:
    """The recipe with the hash of its base model, or without the model if no input needed its weights."""
    if base is None or not base.used:
        return recipe.model_copy(update={"base": None, "base_fingerprint": ""})
    return recipe.model_copy(update={"base_fingerprint": base.fingerprint()})


def _load(
    entry: Input, path: Path, convert_rank: int | None, base: BaseWeights | None, *, verify: bool = False
) -> Adapter:
    adapter = load(path, convert_rank=_convert_rank(entry, convert_rank), base=base, verify=verify)
    # a folder in the Hugging Face cache is named after a commit: keep the adapter's name
    return adapter.sourced(path=entry.path) if entry.path.startswith(HUB_PREFIX) else adapter


def _convert_rank(entry: Input, default: int | None) -> int | None:
    return default if entry.convert_rank is None else entry.convert_rank


def _with_hashes(
    recipe: Recipe, paths: Sequence[Path], adapters: Sequence[Adapter], pending_hashes: Sequence[Future[str]]
) -> list[Adapter]:
    """Return the adapters with the hashes of their files, after comparing them with those of the recipe."""
    hashed: list[Adapter] = []
    for entry, path, adapter, pending in zip(recipe.inputs, paths, adapters, pending_hashes, strict=True):
        sha256 = pending.result()
        _check_hash(path, entry.sha256, sha256)
        hashed.append(adapter.sourced(sha256=sha256))
    return hashed


def _check_hash(path: Path, expected: str, found: str, kind: str = "sha256") -> None:
    if expected and found != expected:
        raise RecipeError(
            "An input is not the file this recipe was written for.",
            file=path,
            expected=f"{kind} {expected}",
            found=f"{kind} {found}",
            remedy=f"find the original file, or remove the {kind} from the recipe to use this one",
        )


def _module_weights(recipe: Recipe, adapters: Sequence[Adapter]) -> list[Mapping[str, float]]:
    """Return the module patterns of each adapter: its own, and those for all inputs that match one of its modules."""
    tables = [dict(entry.module_weights) for entry in recipe.inputs]
    for pattern, factor in recipe.module_weights.items():
        # where no adapter matches, merge() reports the pattern as an error
        for i in adapters_matching(pattern, adapters) or [0]:
            tables[i][pattern] = tables[i].get(pattern, 1.0) * factor
    return [dict(sorted(table.items())) for table in tables]
