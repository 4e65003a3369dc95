"""LoRA List."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...core.errors import FormatError, MergeError
from ...core.formats.file_info import read_file_info
from ..comfy import folders
from ..sockets import CATEGORY, LORA_STACK

_LIST = io.Custom("LEGOMOLE_LORA_LIST")  # a widget, drawn by web/lora_list.js


class Entry(BaseModel):
    """A row of the list: a file, whether it is switched on, and its strength on model and text encoders."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    on: bool = True
    strength: float = Field(1.0, ge=-100, le=100)


_ENTRIES = TypeAdapter(tuple[Entry, ...])


def parse_entries(text: str) -> tuple[Entry, ...]:
    """Parse the value of the widget.

    Args:
        text: JSON: ``[{"name": "a.safetensors", "on": true, "strength": 0.8}, ..]``.

    Raises:
        MergeError: Other text.
    """
    try:
        return _ENTRIES.validate_json(text or "[]")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        location = ".".join(str(part) for part in first["loc"])
        raise MergeError(
            "This is not a list of LoRAs.",
            module=f"loras {location}".strip(),
            expected='[{"name": "a.safetensors", "on": true, "strength": 0.8}, ..]',
            found=f"{str(first['input'])[:100]} ({first['msg']})",
            remedy="choose the LoRAs on the node again",
        ) from None


class LoRAList(io.ComfyNode):
    """Names several LoRA files and their strengths. The nodes that use them read the files."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoRAList",
            display_name="LoRA List",
            category=CATEGORY,
            description="Several LoRA files in one list, with search, strengths, switches, and order by dragging. For "
            "LEGO Merge, MoLE Mix, and nodes of other packs that take a LORA_STACK.",
            search_aliases=["lora stack", "power lora loader", "multi lora", "lora loader", "legomole"],
            inputs=[
                _LIST.Input("loras", tooltip="The LoRAs, in order. Those switched off are not used."),
                LORA_STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack to add these LoRAs to, also from other packs."
                ),
            ],
            outputs=[
                LORA_STACK.Output(
                    "stack",
                    display_name="LORA_STACK",
                    tooltip="The incoming stack plus the LoRAs that are switched on.",
                ),
                io.String.Output(
                    "trigger_words",
                    display_name="trigger words",
                    tooltip="The trigger words in the files of the LoRAs that are switched on, one line per LoRA.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, loras: str | None = None, **others: Any) -> object:
        """Run the node again when a file has changed."""
        if loras is None:
            return float("nan")
        try:
            return [folders.fingerprint(entry.name, folders.LORAS) for entry in parse_entries(loras) if entry.on]
        except (MergeError, FormatError):  # `execute` raises it again, where the user sees it
            return float("nan")

    @classmethod
    def execute(cls, loras: str, lora_stack: list[tuple[str, float, float]] | None = None) -> io.NodeOutput:
        used = [entry for entry in parse_entries(loras) if entry.on]
        words = [", ".join(read_file_info(folders.lora_path(entry.name)).words) for entry in used]
        stack = [(entry.name, entry.strength, entry.strength) for entry in used]
        return io.NodeOutput([*(lora_stack or []), *stack], "\n".join(words))
