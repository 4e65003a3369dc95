"""Load LoRA (file)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..comfy import folders
from ..graph_lora import GraphLora, StackEntry
from ..sockets import CATEGORY, LORA_STACK, lora_output, strength_input
from ..words import split_words


class LoadLoRA(io.ComfyNode):
    """Names a LoRA file and its strengths. The nodes that use it read the file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoadLoRA",
            display_name="Load LoRA (file)",
            category=CATEGORY,
            description="A LoRA file to merge or apply. Chain several through lora_stack.",
            search_aliases=["lora loader", "lora stack", "legomole", "lego lora"],
            inputs=[
                io.Combo.Input(
                    "lora_name", options=folders.file_names(folders.LORAS), tooltip="A file in the loras folder."
                ),
                strength_input("strength_model", "Strength on the diffusion model. A negative one subtracts the LoRA."),
                strength_input("strength_clip", "Strength on the text encoders."),
                io.Int.Input(
                    "convert_rank",
                    default=0,
                    min=0,
                    max=1024,
                    advanced=True,
                    tooltip="Only for LoHa, LoKr, DoRA and other files that are not plain LoRAs: a merge "
                    "approximates them at this rank, e.g. 32. 0 refuses them.",
                ),
                io.String.Input(
                    "words",
                    default="",
                    optional=True,
                    advanced=True,
                    tooltip="The words that call for this LoRA in a prompt, separated by commas, for LEGO Merge and "
                    "MoLE Mix. If empty, the trigger words in the file are used.",
                ),
                LORA_STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack to add this LoRA to, also from other packs."
                ),
            ],
            outputs=[
                lora_output("This LoRA, with its strengths."),
                LORA_STACK.Output("stack", display_name="LORA_STACK", tooltip="The incoming stack plus this LoRA."),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, lora_name: str | None = None, **others: Any) -> object:
        """Run the node, and the merges after it, again when the file has changed."""
        return folders.fingerprint(lora_name, folders.LORAS)

    @classmethod
    def execute(
        cls,
        lora_name: str,
        strength_model: float,
        strength_clip: float,
        convert_rank: int = 0,
        words: str | None = None,
        lora_stack: list[tuple[str, float, float]] | None = None,
    ) -> io.NodeOutput:
        path = folders.lora_path(lora_name)
        own_words = tuple(split_words(words or ""))
        lora = GraphLora(path, Path(lora_name).stem, strength_model, strength_clip, convert_rank, words=own_words)
        entry = StackEntry.of(lora_name, strength_model, strength_clip, convert_rank, own_words)
        return io.NodeOutput(lora, [*(lora_stack or []), entry])
