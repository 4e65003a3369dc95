"""Apply LoRA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from comfy_api.latest import io

from ..comfy import display, folders, lora_loader
from ..graph_lora import GraphLora, connected_loras
from ..sockets import CATEGORY, LEGOMOLE_LORA, LORA_STACK, report_output, strength_input


class ApplyLoRA(io.ComfyNode):
    """Patches a LoRA, or each of a stack, into a model, exactly as the stock loader does with the saved file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_ApplyLoRA",
            display_name="Apply LoRA",
            category=CATEGORY,
            description="Applies a LoRA without saving it, with the same result as loading its saved file.",
            search_aliases=["lora loader", "patch lora", "legomole"],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to patch."),
                io.MultiType.Input(
                    "lora",
                    [LEGOMOLE_LORA, LORA_STACK],
                    tooltip="A merged or loaded LoRA, or a stack such as LoRA List's, applied one after the other.",
                ),
                strength_input("strength_model", "Factor on the LoRA's own strength on the diffusion model."),
                strength_input("strength_clip", "Factor on the LoRA's own strength on the text encoders."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders, for LoRAs that also change those."),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The patched diffusion model."),
                io.Clip.Output("CLIP", tooltip="The patched text encoders; empty if none are connected."),
                report_output("What was applied, and which keys of the file could not be used."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, lora: object, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        texts: list[str] = []
        for one in connected_loras({"lora": lora}, folders.lora_path, may_be_none=True) or [GraphLora.empty()]:
            model, clip, dropped = lora_loader.apply_with_dropped(one, model, clip, strength_model, strength_clip)
            strengths = strength_model * one.strength_model, strength_clip * one.strength_clip
            texts.append(_report(one, *strengths, clip, dropped))
        text = "\n".join(texts)
        return io.NodeOutput(model, clip, text, ui=display.show_text(text))


def _report(lora: GraphLora, strength_model: float, strength_clip: float, clip: Any, dropped: Sequence[str]) -> str:
    """Describe what was applied to the user."""
    if lora.is_empty:
        return "no LoRA is connected or switched on: model and CLIP are passed on unchanged"
    text_encoders = "" if clip is None else f", on the text encoders {strength_clip:g}"
    lines = [f"{lora.label}: strength on the model {strength_model:g}{text_encoders}"]
    lines += display.dropped_section(dropped)
    if lora.note:
        lines.append(f"  note: {lora.note}")
    return display.with_dropped_first("\n".join(lines), dropped)
