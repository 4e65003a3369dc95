"""Save LoRA."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfy_api.latest import io

from ...core import formats
from ...core.adapter import Adapter
from ...core.merge.engine import merge
from ...core.merge.methods import METHODS
from ..comfy import program
from ..loaded_loras import adapter_of
from ..lora import Lora
from ..sockets import CATEGORY, LEGOMOLE_LORA

AS_IS, AUTO = "as is", "auto"
_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


def lora_format(adapter: Adapter) -> str:
    """The file format an adapter came in, or comfy where that is not a single file."""
    format = adapter.source.format
    return format if format in formats.FORMATS and format != "peft" else "comfy"


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
                    options=[AS_IS, *_DTYPES],
                    default=AS_IS,
                    advanced=True,
                    tooltip="Number format of the file. as is: the widest of the LoRAs that went in.",
                ),
            ],
            outputs=[io.String.Output("path", display_name="path", tooltip="Where the file was written.")],
        )

    @classmethod
    def execute(cls, lora: Lora, filename_prefix: str, format: str, dtype: str) -> io.NodeOutput:
        adapter = adapter_of(lora)
        if (lora.strength_model, lora.strength_clip) != (1.0, 1.0):
            sum_of_one = METHODS["concat"]()
            scaled = merge([adapter], sum_of_one, [lora.strength_model], text_encoder_weights=[lora.strength_clip])
            adapter = replace(scaled.adapter, metadata=adapter.metadata, source=adapter.source)
        chosen = format if format != AUTO else lora_format(adapter)
        path = formats.save(adapter, program.save_path(filename_prefix), format=chosen, dtype=_DTYPES.get(dtype))
        return io.NodeOutput(str(path), ui=program.show(str(path)))
