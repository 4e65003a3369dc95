"""LEGO Merge and Merge LoRAs."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...core import formats
from ...core.adapter import Adapter, Source
from ...core.errors import MergeError
from ...core.merge.engine import merge
from ...core.merge.methods import METHODS, MergeMethod
from ...core.merge.report import MergeReport
from ...core.merge.statistics import Statistics
from ...core.recipes import recipe
from ...core.recipes.metadata import file_metadata
from ...core.recipes.method_settings import method_settings
from ..comfy import program
from ..loaded_loras import LoadedLoras
from ..lora import Lora, flatten
from ..settings import built, module_weights, settings
from ..sockets import (
    CATEGORY,
    lora_output,
    loras_input,
    method_input,
    model_inputs,
    module_weights_input,
    statistics_input,
    widget,
)
from .read_cache import read

_LOG = logging.getLogger(__name__)

LEGO = METHODS["lego"]
OTHERS = {name: method for name, method in METHODS.items() if method is not LEGO}


def _outputs() -> list[Any]:
    return [
        lora_output("The merged LoRA: connect it to Apply LoRA, Save LoRA or another merge."),
        io.String.Output("report", display_name="report", tooltip="What the merge did, layer by layer in short."),
    ]


def _merge(
    loras: Mapping[str, Any],
    method: str,
    widgets: Mapping[str, Any],
    statistics: Statistics | None,
    model: Any,
    clip: Any,
    rules: str | None,
) -> io.NodeOutput:
    """Read, merge, and say what happened: what both nodes do."""
    if statistics is not None and model is None:
        raise MergeError(
            "Statistics call layers by the names that the connected model gives them, and no model is connected.",
            expected="the model that Calibrate measured",
            found="nothing connected to model",
            remedy="connect the same model (and clip) here",
        )
    values = flatten(loras, program.lora_path)
    built(METHODS, {**widgets, "method": method}, statistics)  # wrong settings are told before large files are read
    reading = read(values, model, clip)
    measured = None if statistics is None else statistics.of(reading.adapters)
    chosen = built(METHODS, {**widgets, "method": method}, measured)
    lora, report = merged(values, reading, chosen, model, rules or "", program.progress())
    shown = text = report.text()
    if report.dropped:
        shown = f"{len(report.dropped)} keys could not be merged, see below.\n{text}"  # a node shows few lines at first
        _LOG.warning("LegoMoLE: %d keys could not be merged: %s", len(report.dropped), report.dropped)
    return io.NodeOutput(lora, text, ui=program.show(shown))


def merged(
    values: Sequence[Lora],
    reading: LoadedLoras,
    chosen: MergeMethod,
    model: Any,
    rules: str = "",
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Lora, MergeReport]:
    """Merge LoRAs that have been read; the result with its recipe, and what happened.

    Args:
        values: With their strengths. reading: What was read of them.
        chosen: The method. model: The MODEL they were read with, if any.
        rules: Weights per layer, see `settings.module_weights`.
        progress: See `core.merge.engine.merge`.

    Raises:
        MergeError: See `core.merge.engine.merge`.
    """
    per_module = module_weights(rules, reading.adapters)
    result = merge(
        reading.adapters,
        chosen,
        [value.strength_model for value in values],
        text_encoder_weights=[value.strength_clip for value in values],
        module_weights=per_module,
        progress=progress,
        cache=reading.cache,
    )
    report = replace(
        result.report,
        dropped=(*result.report.dropped, *reading.dropped),
        notes=(*result.report.notes, *reading.notes, *_advice(result.adapter, model)),
    )
    made = recipe.Recipe(
        method=report.method,
        settings=method_settings(chosen),
        inputs=[
            recipe.Input(
                path=adapter.source.path or value.label,
                sha256=adapter.source.sha256,
                weight=value.strength_model,
                text_encoder_weight=value.strength_clip,
                module_weights=weights,
            )
            for value, adapter, weights in zip(values, reading.adapters, per_module, strict=True)
        ],
        convert_rank=max(value.convert_rank for value in values) or None,
    )
    label = f"{report.method}({', '.join(report.inputs)})"
    adapter = replace(
        reading.finish(result.adapter),
        metadata=file_metadata(made, report, reading.adapters),
        source=Source(label, format="comfy" if model is not None else formats.detect([*result.adapter.modules])),
    )
    return Lora(adapter, label), report


def _advice(adapter: Adapter, model: Any) -> Iterator[str]:
    if model is None and any(name.startswith("unet.") for name in adapter.modules):
        yield "ComfyUI's stock loader does not read names such as unet.*: connect the model to get names it reads"


class LegoMerge(io.ComfyNode):
    """LoRA-LEGO (arXiv 2409.16167): the LoRAs' units are clustered, each cluster becomes one unit of the result."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        shown = ("rank", "geometry", "parameter_reweight", "output_reweight")
        return io.Schema(
            node_id="LegoMoLE_LegoMerge",
            display_name="LEGO Merge",
            category=CATEGORY,
            description="Merge LoRAs of any ranks into one by clustering their smallest building blocks (LoRA-LEGO).",
            search_aliases=["merge lora", "combine loras", "lora lego", "legomole", "lora merger"],
            inputs=[
                loras_input(),
                *(widget(setting, advanced=setting.name not in shown) for setting in settings(LEGO)),
                *model_inputs(),
                statistics_input(),
                module_weights_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        loras: dict[str, Any],
        model: Any = None,
        clip: Any = None,
        statistics: Statistics | None = None,
        module_weights: str | None = None,
        **widgets: Any,
    ) -> io.NodeOutput:
        return _merge(loras, "lego", widgets, statistics, model, clip, module_weights)


class MergeLoRAs(io.ComfyNode):
    """The other methods of the table, to use and to compare with."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_MergeLoRAs",
            display_name="Merge LoRAs",
            category=CATEGORY,
            description="Merge LoRAs by another method than LEGO: the exact sum (concat), its best low-rank "
            "approximation (svd), the known heuristics (linear, TIES, DARE, KnOTS), or calibrated on the model.",
            search_aliases=["merge lora", "combine loras", "ties", "dare", "knots", "svd", "legomole", "lora merger"],
            inputs=[
                loras_input(),
                method_input(
                    OTHERS,
                    "concat: the exact sum, with the ranks added up. svd: the closest LoRA of a given rank to that "
                    "sum. linear, ties, dare, knots: the known heuristics. calibrated: least squares on what Calibrate "
                    "measured.",
                ),
                *model_inputs(),
                statistics_input(),
                module_weights_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        loras: dict[str, Any],
        method: dict[str, Any],
        model: Any = None,
        clip: Any = None,
        statistics: Statistics | None = None,
        module_weights: str | None = None,
    ) -> io.NodeOutput:
        return _merge(loras, method["method"], method, statistics, model, clip, module_weights)
