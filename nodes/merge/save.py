"""Save LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ...core import formats
from ..comfy import program
from ..lora import Lora
from ..sockets import CATEGORY, LEGOMOLE_LORA
from .recorded import DTYPES, save_lora

AS_IS, AUTO = "as is", "auto"


class SaveLoRA(io.ComfyNode):
    """Write a LoRA into the loras folder, with the recipe of its making in the metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_SaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description="Save a LoRA to the loras folder, so that any loader can use it.",
            search_aliases=["export lora", "write lora", "legomole"],
            is_output_node=True,
            inputs=[
                LEGOMOLE_LORA.Input("lora", tooltip="A merged or loaded LoRA. Its strengths become part of the file."),
                io.String.Input(
                    "filename_prefix",
                    default="legomole/merged",
                    tooltip="Name inside the loras folder, a number is added. May hold a subfolder and the date as "
                    "%year%, %month%, %day%. Existing files are never overwritten.",
                ),
                io.Combo.Input(
                    "format",
                    options=[AUTO, *(name for name in formats.FORMATS if name != "peft")],
                    default=AUTO,
                    advanced=True,
                    tooltip="How the keys are named. auto: as ComfyUI names them after a merge with a model connected, "
                    "else as in the LoRAs that went in.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=[AS_IS, *DTYPES],
                    default=AS_IS,
                    advanced=True,
                    tooltip="Number format of the file. as is: the widest of the LoRAs that went in.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, lora: Lora, filename_prefix: str, format: str, dtype: str) -> io.NodeOutput:
        path = save_lora(
            lora,
            program.save_path(filename_prefix),
            None if format == AUTO else format,
            None if dtype == AS_IS else dtype,
            program.progress(),
        )
        return io.NodeOutput(str(path), ui=program.show(str(path)))
