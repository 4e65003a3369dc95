"""The metadata of a merged file: how it was made, and what other tools look for."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ..adapter import CONFIG_KEY, Adapter
from ..errors import name_some
from ..formats.peft_config import combine_configs, labelled_configs
from ..formats.writing import STALE
from ..json_text import from_json
from ..merge.account import Prediction
from ..merge.findings.finding import Finding
from ..merge.report import MANY, MergeReport, ModuleReport
from .recipe import HUB_PREFIX, Conversion, Recipe

KEY = "legomole"
"""The metadata entry that holds recipe and report as JSON."""

NOT_REPEATABLE = "legomole cannot repeat this merge from its recipe"
"""Beginning of the note in a report that gives the reasons."""

# Entries about a training. They are kept if all inputs have them and agree: the result was trained in the same way.
_TRAINING = re.compile(r"ss_.*|training_info")
_BASE_MODEL = ("ss_base_model_version", "ss_v2")  # kept as entries of other kinds are
# Entries about one file alone, and those that are made anew from all inputs.
_REPLACED = re.compile(
    r"ss_(tag_frequency|output_name|session_id|training_(started|finished)_at|network_.*|.*model_hash)|sshs_.*|"
    r"modelspec\.(title|merged_from|hash_sha256|date|thumbnail|trigger_phrase)|format|name|"
    + "|".join(map(re.escape, (KEY, CONFIG_KEY, *STALE)))
)
_PEFT_KEPT_IF_EQUAL = ("base_model_name_or_path", "revision", "task_type")
_MAX_VALUE = 100  # characters of a value in a note
_MAX_TAGS = 20  # per data set in ss_tag_frequency: enough to find a trigger word, small in the header


def file_metadata(recipe: Recipe, report: MergeReport, inputs: Sequence[Adapter]) -> dict[str, str]:
    """Return the metadata of a merged file. Equal merges give equal text.

    The entry `KEY` holds the recipe and a compact report as JSON. Of the paths of inputs and statistics only the file
    names are kept, because folders are private, unlike names on the Hugging Face Hub. Other entries, such as
    ``modelspec.architecture`` or ``reference_downscale_factor``, are kept if the inputs that have them agree, and
    entries about the training if all inputs do; trigger phrases are joined; of each training set's tags the most
    frequent are kept. For PEFT configurations see `combine_configs`.

    Args:
        recipe: The merge.
        report: Its report.
        inputs: The adapters as loaded, for their hashes and metadata, in the recipe's order. Those without a hash are
            recorded as adapters in memory.
    """
    entries = [
        entry.model_copy(
            update={
                "path": _file_name(entry.path),
                "sha256": adapter.source.sha256,
                "in_memory": not adapter.source.sha256,
            }
        )
        for entry, adapter in zip(recipe.inputs, inputs, strict=True)
    ]
    settings = {key: _file_name(value) if key == "statistics" else value for key, value in recipe.settings.items()}
    base = None if recipe.base is None else _file_name(recipe.base)
    stored = recipe.model_copy(update={"inputs": entries, "settings": settings, "base": base})
    labels = [adapter.label for adapter in inputs]
    metadata = {
        KEY: _to_json({"recipe": stored.to_dict(), "report": compact(report)}),
        "modelspec.title": f"{' + '.join(labels)} ({report.method})",
        "modelspec.merged_from": ", ".join(labels),
    }
    metadata |= _common_entries(inputs)[0]
    phrases = [phrase for adapter in inputs if (phrase := adapter.metadata.get("modelspec.trigger_phrase"))]
    if phrases:
        metadata["modelspec.trigger_phrase"] = ", ".join(dict.fromkeys(phrases))
    tags = _most_frequent_tags(inputs)
    if tags:
        metadata["ss_tag_frequency"] = json.dumps(tags, ensure_ascii=False)
    config = combine_configs(inputs)
    if config:
        metadata[CONFIG_KEY] = json.dumps(config, sort_keys=True)
    return metadata


def with_conversion(metadata: Mapping[str, str], step: Conversion) -> dict[str, str]:
    """Return the metadata of a merged file with a conversion added to its recipe."""
    return _with_entry(metadata, "recipe", "conversions", step.model_dump(exclude_defaults=True))


def with_note(metadata: Mapping[str, str], note: str) -> dict[str, str]:
    """Return the metadata of a merged file with a note added to its report."""
    return _with_entry(metadata, "report", "notes", note)


def _with_entry(metadata: Mapping[str, str], part: str, field: str, entry: object) -> dict[str, str]:
    try:
        data = from_json(metadata[KEY])
        changed = {**data[part], field: [*data[part].get(field, []), entry]}
    except (ValueError, KeyError, TypeError, AttributeError):  # broken; whoever reads it gets an error
        return dict(metadata)
    return {**metadata, KEY: _to_json({**data, part: changed})}


def _common_entries(inputs: Sequence[Adapter]) -> tuple[dict[str, str], dict[str, list[tuple[str, str]]], list[str]]:
    """The entries on which the inputs agree; those that differ, with (label, value); those about training that do."""
    values: dict[str, list[tuple[str, str]]] = {}
    for adapter in inputs:
        for key, value in adapter.metadata.items():
            if value and _REPLACED.fullmatch(key) is None:
                values.setdefault(key, []).append((adapter.label, value))
    common: dict[str, str] = {}
    differing: dict[str, list[tuple[str, str]]] = {}
    training: list[str] = []
    for key, pairs in sorted(values.items()):
        agree = len({value for _, value in pairs}) == 1
        if _TRAINING.fullmatch(key) and key not in _BASE_MODEL:
            if agree and len(pairs) == len(inputs):
                common[key] = pairs[0][1]
            else:
                training.append(key)
        elif agree:
            common[key] = pairs[0][1]
        else:
            differing[key] = pairs
    return common, differing, training


def with_recipe_fields(metadata: Mapping[str, str], **fields: Any) -> dict[str, str]:
    """Return the metadata of a merged file with some fields of its recipe replaced, e.g. the format."""
    data = from_json(metadata[KEY])
    return {**metadata, KEY: _to_json({**data, "recipe": {**data["recipe"], **fields}})}


def _to_json(data: Mapping[str, Any]) -> str:
    return json.dumps(data, sort_keys=True, ensure_ascii=False)


def _file_name(path: str) -> str:
    return path if path.startswith(HUB_PREFIX) else path.replace("\\", "/").rstrip("/").rsplit("/", 1)[-1]


def _most_frequent_tags(inputs: Sequence[Adapter]) -> dict[str, dict[str, int]]:
    """Return kohya's tag counts, ``data set -> tag -> count``, of all inputs; data sets are prefixed by the label."""
    merged: dict[str, dict[str, int]] = {}
    for adapter in inputs:
        try:
            tables = from_json(adapter.metadata.get("ss_tag_frequency") or "{}")
            for name, table in tables.items():
                merged[f"{adapter.label}/{name}"] = dict(Counter[str](table).most_common(_MAX_TAGS))
        except (ValueError, AttributeError, TypeError):  # not in kohya's form
            continue
    return merged


def disagreements(inputs: Sequence[Adapter]) -> list[str]:
    """Return notes on metadata of the inputs that contradict each other or leave the scale of an adapter open."""
    notes = [
        f"{adapter.label} has no adapter_config.json: its scale was assumed to be 1"
        for adapter in inputs
        if adapter.source.format == "peft"
        and CONFIG_KEY not in adapter.metadata
        and all(part.alpha is None for part in adapter.modules.values())
    ]
    _, values, training = _common_entries(inputs)
    values |= {
        key: [(label, str(c[key])) for label, c in labelled_configs(inputs) if c.get(key)]
        for key in _PEFT_KEPT_IF_EQUAL
    }
    for key, pairs in values.items():
        if len({value for _, value in pairs}) > 1:
            shown = (f"{value[:_MAX_VALUE]} ({label})" for label, value in pairs)
            notes.append(f"{key} differs: {name_some(shown, MANY)}")
    if training:
        count = f"{len(training)} {'entry' if len(training) == 1 else 'entries'}"
        notes.append(f"{count} about the training are not kept, because the inputs differ: {name_some(training)}")
    return notes


def compact(report: MergeReport) -> dict[str, Any]:
    """Return the report as plain data small enough for a file header: one row per module, numbers with four digits.

    ``overlap`` of a module lists the cosines of the pairs (1,2), (1,3), .. (2,3), ..; ``clusters`` counts merged units
    by composition: ``"9x1+0 2x3+1"`` are nine units made of one unit of the first adapter each, and two that blend
    three units of the first with one of the second. With more adapters than `report.MANY` a module's row has no
    overlaps and its clusters name the adapters: ``"2x3@1+1@9"`` are two units that blend three units of the first
    adapter with one of the ninth.
    """
    many = len(report.inputs) > MANY
    return {
        "energy_kept": _round(report.energy_kept),
        "overlap": [[_round(value) for value in row] for row in report.overlap()],
        "columns": ["loras", "ranks_in", "rank_out", "energy_kept", "overlap", "clusters"],
        "modules": {
            module.name: [
                [i + 1 for i in module.adapters],
                module.ranks_in,
                module.rank_out,
                _round(module.energy_kept),
                [] if many else [_round(value) for i, row in enumerate(module.cosine) for value in row[i + 1 :]],
                _composition(module, many),
            ]
            for module in report.modules
        },
        "passed_on": len(report.passed_on),
        "dropped": report.dropped,
        "notes": report.notes,
        **({"predicted": [_prediction(row) for row in report.predicted]} if report.predicted else {}),
        **({"findings": [_finding(finding) for finding in report.findings]} if report.findings else {}),
    }


def _prediction(row: Prediction) -> list[Any]:
    """``[method, errors of each LoRA alone, [joint, base]]``."""
    alone, (joint, base) = row.alone, (row.joint, row.base)
    return [row.method, *([None if v is None else _round(v) for v in values] for values in (alone, (joint, base)))]


def _finding(finding: Finding) -> dict[str, Any]:
    """A finding without its layers, of which there may be thousands; the sentence names some."""
    row = asdict(finding) | {"value": _round(finding.value), "threshold": _round(finding.threshold)}
    return {key: value for key, value in row.items() if key != "layers"}


def _composition(module: ModuleReport, many: bool) -> str:
    counts = Counter(
        "+".join(f"{n}@{i + 1}" for n, i in zip(cluster, module.adapters, strict=True) if n)
        if many
        else "+".join(map(str, cluster))
        for cluster in module.clusters
    )
    return " ".join(f"{count}x{kind}" for kind, count in counts.items())


def _round(value: float) -> float:
    return float(f"{value:.4g}")
