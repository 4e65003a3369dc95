"""Merge loaded LoRAs and save the result with its recipe in the metadata. Needs nothing of ComfyUI."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ...core import formats
from ...core.adapter import Adapter, Source
from ...core.merge.layer_rules import parse_layer_rules
from ...core.merge.methods import METHODS, MergeMethod
from ...core.merge.rank import Rank
from ...core.merge.report import MergeReport
from ...core.merge.statistics import Statistics
from ...core.merge.tasks import plan_batches
from ...core.merge.weights import Weights
from ...core.progress import Progress
from ...core.recipes.conversion import convert
from ...core.recipes.metadata import KEY, NOT_REPEATABLE, with_recipe_fields
from ...core.recipes.method_settings import method_settings
from ...core.recipes.output import name_output
from ...core.recipes.recipe import Input, Recipe
from ...core.recipes.run import describe, merge_aligned, run
from ...core.recipes.suggest import suggest
from ..graph_lora import GraphLora
from ..loaded_loras import LoadedLoras, adapter_of, file_key_map, read_files


@dataclass(frozen=True)
class Remedies:
    """Settings of a merge against what is found in its inputs.

    Args:
        cap, equalize: See `core.merge.engine.merge`.
        suggested: Multiply the strengths by suggested factors, see `core.recipes.suggest`; with statistics also from
            those.
    """

    cap: float | None = None
    equalize: float = 0.0
    suggested: bool = False


NO_REMEDIES = Remedies()


def merge_loaded(
    loras: Sequence[GraphLora],
    loaded: LoadedLoras,
    method: MergeMethod,
    rules: str = "",
    progress: Progress | None = None,
    *,
    statistics: Statistics | None = None,
    remedies: Remedies = NO_REMEDIES,
) -> tuple[GraphLora, MergeReport]:
    """Merge LoRAs that have been loaded.

    Args:
        loras: The LoRAs, for their strengths.
        loaded: The same LoRAs as the engine merges them.
        method: The merge method.
        rules: Weights per layer, see `core.merge.layer_rules`.
        progress, statistics: See `core.merge.engine.merge`.
        remedies: What is done about findings; default nothing.

    Returns:
        The merged LoRA, with its recipe in the metadata, and the report. Why a recipe cannot be repeated from files is
        noted in the metadata only, because there a model is connected most of the time. A lowered rank and files found
        under other names are noted in the report only: the recipe holds what was used.

    Raises:
        MergeError: See `core.merge.engine.merge`.
    """
    tables = parse_layer_rules(rules, len(loaded.adapters), [adapter.layers for adapter in loaded.adapters])
    inputs = [
        Input(
            path=adapter.source.path or lora.label,
            weight=lora.strength_model,
            text_encoder_weight=lora.strength_clip,
            module_weights=weights,
            convert_rank=lora.convert_rank or None,
        )
        for lora, adapter, weights in zip(loras, loaded.originals, tables, strict=True)
    ]
    recipe = Recipe(
        method=next(name for name, row in METHODS.items() if isinstance(method, row)),
        inputs=inputs,
        cap=remedies.cap,
        equalize=remedies.equalize,
    )
    suggested_notes: tuple[str, ...] = ()
    if remedies.suggested:
        suggestion = suggest(recipe, loaded.adapters, statistics=statistics, choose_method=False)
        recipe = suggestion.apply(recipe)
        suggested_notes = (suggestion.text([adapter.label for adapter in loaded.adapters]),)
    method, rank_notes = with_possible_rank(
        method,
        loaded.adapters,
        [entry.weight for entry in recipe.inputs],
        [entry.text_encoder_weight or 0.0 for entry in recipe.inputs],
        tables,
    )
    recipe = recipe.model_copy(update={"settings": method_settings(method)})
    result = merge_aligned(
        recipe, method, loaded.adapters, progress=progress, cache=loaded.cache, statistics=statistics
    )
    loaded = loaded.hashed()  # only now, because the files are hashed while they are merged
    hashes = [adapter.source.sha256 for adapter in loaded.originals]
    entries = [entry.model_copy(update={"sha256": x}) for entry, x in zip(recipe.inputs, hashes, strict=True)]
    recipe = recipe.model_copy(update={"inputs": entries})
    merged = loaded.finish(result.adapter)
    if loaded.connected:
        recipe = recipe.model_copy(update={"format": "comfy"})
    obstacles = [*_obstacles(loras, loaded, method)]
    hidden_notes = (f"{NOT_REPEATABLE}: {'; '.join(obstacles)}",) if obstacles else ()
    report = replace(
        result.report,
        dropped=(*result.report.dropped, *loaded.dropped),
        notes=(*result.report.notes, *hidden_notes),
    )
    described = describe(
        recipe,
        method,
        replace(result, adapter=merged, report=report),
        loaded.originals,
        renamed=loaded.renamed,
        named=bool(loaded.connected),
    )
    label = f"{recipe.method}({', '.join(report.inputs)})"
    adapter = replace(described.adapter, source=Source(label, format=described.adapter.source.format))
    stored_notes = (note for note in described.report.notes if note not in hidden_notes)
    shown = (*suggested_notes, *loaded.file_notes, *rank_notes, *stored_notes)
    return GraphLora(adapter, label, recipe=None if obstacles else recipe), replace(described.report, notes=shown)


def with_possible_rank(
    method: MergeMethod,
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    text_encoder_weights: Sequence[float],
    module_weights: Sequence[Mapping[str, float]] | None = None,
) -> tuple[MergeMethod, tuple[str, ...]]:
    """Lower a rank that is higher than the LoRAs' ranks together, and return a note on it.

    A widget keeps its value when LoRAs are switched off; the engine alone would refuse it.

    Args:
        method: The merge method.
        adapters, weights, text_encoder_weights, module_weights: See `core.merge.engine.merge`.
    """
    rank = getattr(method, "rank", None)
    if rank is None or rank.unit:
        return method, ()
    checked = Weights.of(adapters, weights, text_encoder_weights, module_weights, False)
    highest = max((sum(batch.ranks) for batch in plan_batches(adapters, checked.modules)), default=rank.value)
    if rank.value <= highest:
        return method, ()
    note = f"rank {rank} is more than the LoRAs' ranks together: merged at rank {highest}, the highest possible"
    return replace(method, rank=Rank(highest)), (note,)  # type: ignore[type-var]


def _obstacles(loras: Sequence[GraphLora], loaded: LoadedLoras, method: MergeMethod) -> Iterator[str]:
    """Why the recipe of a merge does not give the same file again, and what to do about it."""
    if loaded.connected:
        yield f"layers were matched and named through the connected {loaded.connected}, which is needed again"
    if getattr(method, "statistics", None) is not None:
        yield "the statistics of the base model are not saved, measure them again with the same settings"
    for lora in loras:
        if not isinstance(lora.content, Path):
            yield f"{lora.label} was made in the graph, save it with Save LoRA and load that file instead"


def save_lora(
    lora: GraphLora, path: Path, format: str | None = None, dtype: str | None = None, progress: Progress | None = None
) -> Path:
    """Write a LoRA to a file. If it was merged, its recipe names the format and dtype it is saved in.

    The recipe in a file that was loaded gets another format or dtype as a conversion, see `core.recipes.conversion`.

    To save a merge of files in another dtype than its own, it is merged again from the files, because repeating the
    recipe gives those values and not the ones that are rounded twice.

    Args:
        lora: The LoRA. With a strength other than 1 the file becomes a merge of this one LoRA.
        path: The file to write.
        format: Name in ``FORMATS``, whose program shall read the file; default the LoRA's names in its format, or in
            one that is detected from them if it has none for a single file.
        dtype: ``float16``, ``bfloat16`` or ``float32``; default its own.
        progress: See `core.merge.engine.merge`.

    Returns:
        The path written.

    Raises:
        SaveError: The format's program has no names for some layers; and see `core.formats.save`.
        FormatError: A file that cannot be read.
        RecipeError: An input has changed since it was merged.
    """
    adapter = adapter_of(lora)
    if (lora.strength_model, lora.strength_clip) != (1.0, 1.0):
        lora, _ = merge_loaded([lora], read_files([lora]), METHODS["concat"]())
        adapter = adapter_of(lora)
    cast_to = None if dtype is None else getattr(torch, dtype)
    fields = {"format": format or _file_format(adapter)} | ({} if dtype is None else {"dtype": dtype})
    if lora.recipe is not None and cast_to not in (None, adapter.dtype):
        chosen = lora.recipe.model_copy(update=fields if format is not None else {"dtype": dtype})
        again = run(chosen, key_map=file_key_map(), progress=progress).adapter
        return formats.save(again, path, format=format or _file_format(again))
    if isinstance(lora.content, Adapter) and KEY in adapter.metadata:
        keeps_names = format in (None, adapter.source.format)
        named = adapter if keeps_names else name_output(adapter, first_format=_file_format(adapter), format=format)[0]
        named = replace(named, metadata=with_recipe_fields(adapter.metadata, **fields))
        return formats.save(named, path, format=format or _file_format(adapter), dtype=cast_to)
    return formats.save(convert(adapter, format, cast_to), path, format=format or _file_format(adapter))


def _file_format(adapter: Adapter) -> str:
    format = adapter.source.format
    return format if format in formats.FORMATS and format != "peft" else formats.detect(adapter.layers)
