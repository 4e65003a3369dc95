"""LEGO Merge and Merge LoRAs."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...core.adapter import Adapter
from ...core.errors import MergeError
from ...core.merge.methods import METHODS
from ...core.merge.statistics import Statistics
from ..comfy import program
from ..lora import flatten
from ..settings import built, settings
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
from .recorded import merge_loaded

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
    lora, report = merge_loaded(values, reading, chosen, rules or "", program.progress())
    if model is None and isinstance(lora.content, Adapter):
        report = replace(report, notes=(*report.notes, *_advice(lora.content)))
    shown = text = report.text()
    if report.dropped:
        shown = f"{len(report.dropped)} keys could not be merged, see below.\n{text}"  # a node shows few lines at first
        _LOG.warning("LegoMoLE: %d keys could not be merged: %s", len(report.dropped), report.dropped)
    return io.NodeOutput(lora, text, ui=program.show(shown))


def _advice(adapter: Adapter) -> Iterator[str]:
    """Notes for the node only: they would be wrong in the metadata of a file that other programs load."""
    if any(name.startswith("unet.") for name in adapter.modules):
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
