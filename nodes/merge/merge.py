"""LEGO Merge and Merge LoRAs."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from comfy_api.latest import io

from ...core.adapter import Adapter
from ...core.errors import MergeError
from ...core.merge.methods import METHODS
from ...core.merge.statistics import Statistics
from ...core.recipes.method_settings import takes_statistics
from ..comfy import display, folders
from ..comfy.merge_calibration import KeepBase, calibrate_merge
from ..graph_lora import GraphLora, connected_loras, require_all_steps
from ..settings import method_from_widgets, settings_of, works_without_statistics
from ..sockets import (
    CATEGORY,
    ESSENTIALS,
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
from ..words import words_input, words_of_loras
from .read_cache import read
from .recorded import Remedies, merge_loaded

_LOG = logging.getLogger(__name__)

_LEGO = METHODS["lego"]
_OTHER_METHODS = {name: method for name, method in METHODS.items() if method is not _LEGO}
_MINE, _SUGGESTED = "mine", "suggested"
_BASIC_SETTINGS = ("rank", "geometry", "parameter_reweight", "output_reweight")  # the others are advanced


class LegoMerge(io.ComfyNode):
    """Merges LoRAs by LoRA-LEGO (arXiv 2409.16167): units are clustered, and each cluster becomes one unit."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LegoMerge",
            display_name="LEGO Merge",
            category=CATEGORY,
            essentials_category=ESSENTIALS,
            description="Merges LoRAs of any ranks into one, by clustering their rank-one units (LoRA-LEGO).",
            search_aliases=["merge lora", "combine loras", "lora lego", "block weight", "legomole", "lora merger"],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                loras_input(),
                *(setting_input(s, advanced=s.name not in _BASIC_SETTINGS) for s in settings_of(_LEGO)),
                *model_inputs(),
                statistics_input(),
                module_weights_input(),
                *_keep_base_inputs(),
                *_remedy_inputs(),  # last, because workflows hold the values of widgets by position
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        loras: dict[str, Any],
        keep_base: KeepBase = "light",
        words: str | None = None,
        model: Any = None,
        clip: Any = None,
        statistics: Statistics | None = None,
        module_weights: str | None = None,
        cap: float = 0.0,
        equalize: float = 0.0,
        strengths: str = _MINE,
        **settings: Any,
    ) -> io.NodeOutput:
        refuse_unknown(settings, [setting.name for setting in settings_of(_LEGO)])
        widgets = {**settings, "method": "lego"}
        base = BaseModel(model, clip, statistics, keep_base, words or "")
        return _merge(loras, widgets, base, module_weights or "", _remedies(cap, equalize, strengths))


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
            search_aliases=[
                *("merge lora", "combine loras", "lora merger", "ties", "dare", "knots", "svd"),
                *("block weight", "legomole"),
            ],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                loras_input(),
                method_input(
                    _OTHER_METHODS,
                    "concat: the exact sum, with the ranks added up. svd: the LoRA of the chosen rank that is closest "
                    "to the sum. linear, ties, dare, knots, np: published heuristics. calibrated, ssr: fitted to what "
                    "is measured on the model.",
                ),
                *model_inputs(),
                statistics_input(),
                module_weights_input(),
                *_keep_base_inputs(),
                *_remedy_inputs(),  # last, because workflows hold the values of widgets by position
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls,
        loras: dict[str, Any],
        method: dict[str, Any],
        keep_base: KeepBase = "light",
        words: str | None = None,
        model: Any = None,
        clip: Any = None,
        statistics: Statistics | None = None,
        module_weights: str | None = None,
        cap: float = 0.0,
        equalize: float = 0.0,
        strengths: str = _MINE,
        **unknown: Any,
    ) -> io.NodeOutput:
        refuse_unknown(unknown)
        base = BaseModel(model, clip, statistics, keep_base, words or "")
        return _merge(loras, method, base, module_weights or "", _remedies(cap, equalize, strengths))


@dataclass(frozen=True, eq=False)
class BaseModel:
    """What the nodes know of the base model.

    Args:
        model, clip: What is connected, if anything.
        statistics: Statistics of Calibrate, if connected.
        keep_base: How to measure statistics where none are connected.
        words: One line of words per LoRA, see `words_of_loras`.
    """

    model: Any
    clip: Any
    statistics: Statistics | None
    keep_base: KeepBase
    words: str


def _keep_base_inputs() -> list[Any]:
    return [
        io.Combo.Input(
            "keep_base",
            options=list(get_args(KeepBase)),
            default="light",
            optional=True,
            display_name="keep the base model",
            tooltip="With MODEL and CLIP connected: measure the model, so that the merge acts like each LoRA where a "
            "prompt asks for it and changes little elsewhere. Takes as long as one image per LoRA, once. thorough: "
            "more exact, needs gigabytes of memory for large models. off: do not measure.",
        ),
        words_input("To keep the base model.", optional=True),
    ]


def _remedy_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "cap",
            default=0.0,
            min=0.0,
            max=1000.0,
            step=1.0,
            optional=True,
            tooltip="Against spectral spikes: lower singular values that exceed this many times their layer's median, "
            "e.g. 8, to the largest one that does not. 0: do not.",
        ),
        io.Float.Input(
            "equalize",
            default=0.0,
            min=0.0,
            max=1.0,
            step=0.05,
            optional=True,
            tooltip="Bring the loudness of the LoRAs together. 0: not at all. 1: all equally loud.",
        ),
        io.Combo.Input(
            "strengths",
            options=[_MINE, _SUGGESTED],
            default=_MINE,
            optional=True,
            tooltip="suggested: your strengths times factors with which every LoRA acts in the merge as it does alone, "
            "so that what several have in common counts once; with a cap and equalize where they are needed. With "
            "MODEL and CLIP, methods such as concat and svd get the strengths predicted best for prompts that name "
            "several LoRAs. The report shows them.",
        ),
    ]


def _remedies(cap: float, equalize: float, strengths: str) -> Remedies:
    return Remedies(cap or None, equalize, strengths == _SUGGESTED)


def _outputs() -> list[Any]:
    return [
        lora_output("The merged LoRA. Connect it to Apply LoRA, Save LoRA or another merge."),
        report_output("A summary of the merge."),
    ]


def _merge(
    loras: Mapping[str, Any], widgets: Mapping[str, Any], base: BaseModel, module_weights: str, remedies: Remedies
) -> io.NodeOutput:
    """Load and merge LoRAs, and show the report.

    Args:
        loras: Values of the growing input.
        widgets: The method and its settings.
        base: What is known of the base model.
        module_weights: Rules for layer weights.
        remedies: What is done about findings.
    """
    if base.statistics is not None and base.model is None:
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
    require_all_steps(values)
    words = words_of_loras(base.words, values)
    name, statistics, note = widgets["method"], base.statistics, ""
    measures = statistics is None and (takes_statistics(name) or remedies.suggested)
    only_suggests = remedies.suggested and not takes_statistics(name)  # the method itself uses no statistics
    if works_without_statistics(METHODS[name]) or not measures:
        # report wrong settings before large files are read
        method_from_widgets(METHODS, widgets, None if only_suggests else statistics)
    loaded = read(values, base.model, base.clip)
    if statistics is not None:
        statistics = statistics.of(loaded.hashed().adapters)
    elif measures:
        progress = display.progress_bar_with_text()
        statistics, note = calibrate_merge(values, loaded, words, base.model, base.clip, base.keep_base, progress)
    method = method_from_widgets(METHODS, widgets, None if only_suggests else statistics, why_none=note)
    lora, report = merge_loaded(
        values, loaded, method, module_weights, display.progress_bar(), statistics=statistics, remedies=remedies
    )
    notes = [note] if note else []
    if base.model is None and isinstance(lora.content, Adapter):
        notes += _notes_for_comfyui(lora.content)
    report = replace(report, notes=(*report.notes, *notes))
    text = report.text()
    shown_text = text
    if any(finding.level != "note" for finding in report.findings):
        shown_text = f"{display.lights_text(report)}\n{text}"
    if report.dropped:
        # a node shows a few lines, and the list of dropped keys comes late in the report
        shown_text = f"{len(report.dropped)} keys could not be merged, see below.\n{shown_text}"
        _LOG.warning("LegoMoLE: %d keys could not be merged: %s", len(report.dropped), report.dropped)
    return io.NodeOutput(lora, text, ui=display.show_text(shown_text))


def _notes_for_comfyui(adapter: Adapter) -> list[str]:
    """Return notes that only matter in ComfyUI, and so are not stored in the metadata of the file."""
    if any(name.startswith("unet.") for name in adapter.modules):
        return ["ComfyUI's stock loader does not read names such as unet.*: connect the model to get names it reads"]
    return []
