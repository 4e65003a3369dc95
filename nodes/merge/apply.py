"""Apply LoRA."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..comfy import lora_loader
from ..graph_lora import GraphLora
from ..sockets import CATEGORY, LEGOMOLE_LORA, strength_input


class ApplyLoRA(io.ComfyNode):
    """Patches a LoRA into a model, exactly as the stock loader does with the saved file."""

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
                LEGOMOLE_LORA.Input("lora", tooltip="A merged or loaded LoRA."),
                strength_input("strength_model", "Factor on the LoRA's own strength on the diffusion model."),
                strength_input("strength_clip", "Factor on the LoRA's own strength on the text encoders."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders, for LoRAs that also change those."),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The patched diffusion model."),
                io.Clip.Output("CLIP", tooltip="The patched text encoders; empty if none are connected."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, lora: GraphLora, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(*lora_loader.apply(lora, model, clip, strength_model, strength_clip))
