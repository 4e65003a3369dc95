"""LEGO Merge and Merge LoRAs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from ...core.adapter import Adapter
from ...core.errors import MergeError
from ...core.merge.methods import METHODS
from ...core.merge.statistics import Statistics
from ..comfy import display, folders
from ..graph_lora import GraphLora, connected_loras
from ..settings import method_from_widgets, settings_of
from ..sockets import (
    CATEGORY,
    lora_output,
    loras_input,
    method_input,
    model_inputs,
    module_weights_input,
    refuse_unknown,
    report_output,
    setting_input,
    statistics_input,
)
from .read_cache import read
from .recorded import merge_loaded

_LOG = logging.getLogger(__name__)

_LEGO = METHODS["lego"]
_OTHER_METHODS = {name: method for name, method in METHODS.items() if method is not _LEGO}
_BASIC_SETTINGS = ("rank", "geometry", "parameter_reweight", "output_reweight")  # the others are advanced


class LegoMerge(io.ComfyNode):
    """Merges LoRAs by LoRA-LEGO (arXiv 2409.16167): units are clustered, and each cluster becomes one unit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LegoMerge",
            display_name="LEGO Merge",
            category=CATEGORY,
            description="Merges LoRAs of any ranks into one, by clustering their rank-one units (LoRA-LEGO).",
            search_aliases=["merge lora", "combine loras", "lora lego", "legomole", "lora merger"],
            inputs=[
                loras_input(),
                *(setting_input(s, advanced=s.name not in _BASIC_SETTINGS) for s in settings_of(_LEGO)),
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
        **settings: Any,
    ) -> io.NodeOutput:
        refuse_unknown(settings, [setting.name for setting in settings_of(_LEGO)])
        widgets = {**settings, "method": "lego"}
        return _merge(loras, widgets, model=model, clip=clip, statistics=statistics, module_weights=module_weights)


class MergeLoRAs(io.ComfyNode):
    """Merges LoRAs by one of the other methods."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_MergeLoRAs",
            display_name="Merge LoRAs",
            category=CATEGORY,
            description="Merges LoRAs by a method other than LEGO: their exact sum (concat), its best low-rank "
            "approximation (svd), published heuristics (linear, TIES, DARE, KnOTS), or calibrated on the model.",
            search_aliases=["merge lora", "combine loras", "ties", "dare", "knots", "svd", "legomole", "lora merger"],
            inputs=[
                loras_input(),
                method_input(
                    _OTHER_METHODS,
                    "concat: the exact sum, with the ranks added up. svd: the LoRA of the chosen rank that is closest "
                    "to the sum. linear, ties, dare, knots: published heuristics. calibrated: fitted to what Calibrate "
                    "measured.",
                ),
                *model_inputs(),
                statistics_input(),
                module_weights_input(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(cls, loras: dict[str, Any], method: dict[str, Any], **optional_inputs: Any) -> io.NodeOutput:
        refuse_unknown(optional_inputs, ("model", "clip", "statistics", "module_weights"))
        return _merge(loras, method, **optional_inputs)


def _outputs() -> list[Any]:
    return [
        lora_output("The merged LoRA. Connect it to Apply LoRA, Save LoRA or another merge."),
        report_output("A summary of the merge."),
    ]


def _merge(
    loras: Mapping[str, Any],
    widgets: Mapping[str, Any],
    *,
    model: Any = None,
    clip: Any = None,
    statistics: Statistics | None = None,
    module_weights: str | None = None,
) -> io.NodeOutput:
    """Load and merge LoRAs, and show the report.

    Args:
        loras: Values of the growing input.
        widgets: The method and its settings.
        model, clip, statistics: What is connected, if anything.
        module_weights: Rules for layer weights.
    """
    if statistics is not None and model is None:
        raise MergeError(
            "Statistics name layers as the connected model does, and no model is connected.",
            expected="the model that Calibrate measured",
            found="nothing connected to model",
            remedy="connect the same model (and clip) here",
        )
    values = connected_loras(loras, folders.lora_path, may_be_none=True)
    if not values:
        text = "no LoRA is connected or switched on: there is nothing to merge, and Apply LoRA changes nothing"
        return io.NodeOutput(GraphLora.empty(), text, ui=display.show_text(text))
    method_from_widgets(METHODS, widgets, statistics)  # report wrong settings before large files are read
    loaded = read(values, model, clip)
    aligned_statistics = None if statistics is None else statistics.of(loaded.adapters)
    method = method_from_widgets(METHODS, widgets, aligned_statistics)
    lora, report = merge_loaded(values, loaded, method, module_weights or "", display.progress_bar())
    if model is None and isinstance(lora.content, Adapter):
        report = replace(report, notes=(*report.notes, *_notes_for_comfyui(lora.content)))
    text = report.text()
    shown_text = text
    if report.dropped:
        # a node shows a few lines, and the list of dropped keys comes late in the report
        shown_text = f"{len(report.dropped)} keys could not be merged, see below.\n{text}"
        _LOG.warning("LegoMoLE: %d keys could not be merged: %s", len(report.dropped), report.dropped)
    return io.NodeOutput(lora, text, ui=display.show_text(shown_text))


def _notes_for_comfyui(adapter: Adapter) -> list[str]:
    """Return notes that only matter in ComfyUI, and so are not stored in the metadata of the file."""
    if any(name.startswith("unet.") for name in adapter.modules):
        return ["ComfyUI's stock loader does not read names such as unet.*: connect the model to get names it reads"]
    return []
