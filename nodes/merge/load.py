"""Load LoRA (file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..comfy import program
from ..lora import Lora
from ..sockets import CATEGORY, LORA_STACK, lora_output, strength


class LoadLoRA(io.ComfyNode):
    """A LoRA file and the strengths to use it at. The file itself is read where it is used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoadLoRA",
            display_name="Load LoRA (file)",
            category=CATEGORY,
            description="A LoRA file for merging or applying. Chain several through lora_stack.",
            search_aliases=["lora loader", "lora stack", "legomole", "lego lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name", options=program.names(program.LORAS), tooltip="A file in the loras folder."
                ),
                strength("strength_model", "How strongly it acts on the diffusion model. Negative subtracts it."),
                strength("strength_clip", "How strongly it acts on the text encoders."),
                io.Int.Input(
                    "convert_rank",
                    default=0,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="For LoHa, LoKr, DoRA and the like: the rank of their low-rank approximation in a merge. "
                    "0 refuses such files instead of approximating them.",
                ),
                LORA_STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack to put this LoRA on, from here or any other pack."
                ),
            ],
            outputs=[
                lora_output("This LoRA, with its strengths."),
                LORA_STACK.Output(
                    "stack", display_name="LORA_STACK", tooltip="The incoming stack with this LoRA on top."
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> object:
        """Changes when the file changes, so that a merge of an overwritten LoRA runs again."""
        return program.fingerprint(lora_name, program.LORAS)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        convert_rank: int = 0,
        lora_stack: list[tuple[str, float, float]] | None = None,
    ) -> io.NodeOutput:
        path = program.lora_path(lora_name)
        lora = Lora(path, Path(lora_name).stem, strength_model, strength_clip, convert_rank)
        return io.NodeOutput(lora, [*(lora_stack or []), (lora_name, strength_model, strength_clip)])
