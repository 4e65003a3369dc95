"""Save LoRA."""

from __future__ import annotations

from comfy_api.latest import io

from ...core import formats
from ...core.recipes.dtype_names import DTYPES, full_dtype_name
from ..comfy import display, folders
from ..graph_lora import GraphLora
from ..sockets import CATEGORY, LEGOMOLE_LORA, filename_input, path_output
from .recorded import save_lora

_AS_IS, _AUTO = "as is", "auto"


class SaveLoRA(io.ComfyNode):
    """Writes a LoRA to the loras folder; a merged LoRA has its recipe in the metadata."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_SaveLoRA",
            display_name="Save LoRA",
            category=CATEGORY,
            description="Saves a LoRA to the loras folder, for any loader.",
            search_aliases=["export lora", "write lora", "legomole"],
            is_output_node=True,
            inputs=[
                LEGOMOLE_LORA.Input("lora", tooltip="A merged or loaded LoRA. Its strengths become part of the file."),
                filename_input("the loras folder", "legomole/merged"),
                io.Combo.Input(
                    "format",
                    options=[_AUTO, *(name for name in formats.FORMATS if name != "peft")],
                    default=_AUTO,
                    advanced=True,
                    tooltip="The program that shall read the file, which decides how the keys are named. auto: "
                    "ComfyUI's names if a model was connected to the merge or the LoRAs' names differ, otherwise those "
                    "of the LoRAs.",
                ),
                io.Combo.Input(
                    "dtype",
                    options=[_AS_IS, *DTYPES],
                    default=_AS_IS,
                    advanced=True,
                    tooltip="Number format of the file. as is: that of the LoRAs, of several the most precise. Another "
                    "one may take as long as the merge.",
                ),
            ],
            outputs=[path_output()],
        )

    @classmethod
    def validate_inputs(cls, dtype: str | None = None) -> bool | str:
        """Accept short names of dtypes, which ComfyUI's own check of the options would refuse."""
        valid = dtype is None or full_dtype_name(dtype) in (_AS_IS, *DTYPES)
        return valid or f"There is no dtype {dtype!r}. Options: {', '.join((_AS_IS, *DTYPES))}"

    @classmethod
    def execute(cls, lora: GraphLora, filename_prefix: str, format: str, dtype: str) -> io.NodeOutput:
        if lora.is_empty:
            text = "no LoRA is connected or switched on: no file is written"
            return io.NodeOutput("", ui=display.show_text(text))
        path = save_lora(
            lora,
            folders.new_path(filename_prefix),
            None if format == _AUTO else format,
            None if dtype == _AS_IS else full_dtype_name(dtype),
            display.progress_bar(),
        )
        return io.NodeOutput(str(path), ui=display.show_text(str(path)))
