"""Apply LoRA."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..comfy import lora_loader
from ..lora import Lora
from ..sockets import CATEGORY, LEGOMOLE_LORA, strength


class ApplyLoRA(io.ComfyNode):
    """Patch a LoRA into a model, exactly as the stock loader does with the saved file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_ApplyLoRA",
            display_name="Apply LoRA",
            category=CATEGORY,
            description="Use a LoRA at once, as the stock loader would use its saved file.",
            search_aliases=["lora loader", "patch lora", "legomole"],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to patch."),
                LEGOMOLE_LORA.Input("lora", tooltip="A merged or loaded LoRA."),
                strength("strength_model", "Multiplies the LoRA's own strength on the diffusion model."),
                strength("strength_clip", "Multiplies the LoRA's own strength on the text encoders."),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders to patch, if the LoRA trains them."),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The patched diffusion model."),
                io.Clip.Output("CLIP", tooltip="The patched text encoders; empty when none were connected."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, lora: Lora, strength_model: float, strength_clip: float, clip: Any = None
    ) -> io.NodeOutput:
        return io.NodeOutput(*lora_loader.apply(lora, model, clip, strength_model, strength_clip))
