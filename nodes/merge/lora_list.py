"""LoRA List."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from ...core.errors import FormatError, MergeError
from ...core.file_info import read_file_info
from ..comfy import program
from ..sockets import CATEGORY, LORA_STACK

_LIST = io.Custom("LEGOMOLE_LORA_LIST")  # web/lora_list.js draws it


class Entry(BaseModel):
    """A row of the list: a file, whether it is switched on, and its strength for the model and the text encoders."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    on: bool = True
    strength: float = Field(1.0, ge=-100, le=100)


_ENTRIES = TypeAdapter(tuple[Entry, ...])


def entries(text: str) -> tuple[Entry, ...]:
    """The rows that the page's list stands for.

    Args:
        text: JSON: ``[{"name": "a.safetensors", "on": true, "strength": 0.8}, ..]``.

    Raises:
        MergeError: It is something else.
    """
    try:
        return _ENTRIES.validate_json(text or "[]")
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise MergeError(
            "This is not a list of LoRAs.",
            module=f"loras {place}".strip(),
            expected='[{"name": "a.safetensors", "on": true, "strength": 0.8}, ..]',
            found=f"{str(first['input'])[:100]} ({first['msg']})",
            remedy="choose the LoRAs on the node again",
        ) from None


class LoRAList(io.ComfyNode):
    """Several LoRA files in one node. The files themselves are read where they are used."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoRAList",
            display_name="LoRA List",
            category=CATEGORY,
            description="Several LoRAs in one list: search, strengths, on and off, order by drag. For LEGO Merge, MoLE "
            "Mix and every node of other packs that takes a LORA_STACK.",
            search_aliases=["lora stack", "power lora loader", "multi lora", "lora loader", "legomole"],
            inputs=[
                _LIST.Input("loras", tooltip="The LoRAs, in order. Those that are switched off are left out."),
                LORA_STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack to put these LoRAs on, from here or any other pack."
                ),
            ],
            outputs=[
                LORA_STACK.Output(
                    "stack",
                    display_name="LORA_STACK",
                    tooltip="The incoming stack, with the LoRAs of this list that are on.",
                ),
                io.String.Output(
                    "trigger_words",
                    display_name="trigger words",
                    tooltip="What the files of this list that are on want to be called in a prompt, one line per LoRA.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, loras: str | None = None, **others: Any) -> object:
        """Changes when a file changes."""
        if loras is None:
            return float("nan")
        try:
            return [program.fingerprint(entry.name, program.LORAS) for entry in entries(loras) if entry.on]
        except (MergeError, FormatError):  # `execute` says it where the user sees it
            return float("nan")

    @classmethod
    def execute(cls, loras: str, lora_stack: list[tuple[str, float, float]] | None = None) -> io.NodeOutput:
        used = [entry for entry in entries(loras) if entry.on]
        words = [", ".join(read_file_info(program.lora_path(entry.name)).words) for entry in used]
        stack = [(entry.name, entry.strength, entry.strength) for entry in used]
        return io.NodeOutput([*(lora_stack or []), *stack], "\n".join(words))
