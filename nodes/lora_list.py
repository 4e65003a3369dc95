"""LoRA List."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator

from ..core.errors import FormatError, MergeError
from ..core.formats.sidecar import trigger_words
from .comfy import display, folders, lora_loader
from .graph_lora import StackEntry, connected_loras
from .merge.merge import LegoMerge
from .mole.mole import MoLEMix
from .sockets import CATEGORY, ESSENTIALS, LORA_STACK
from .words import split_words

_LIST = io.Custom("LEGOMOLE_LORA_LIST")  # a widget, drawn by web/lora_list.js
Stack = list[tuple[str, float, float]]


class Entry(BaseModel):
    """A row of the list: a file, whether it is switched on, and its strengths.

    Args:
        name: The file's name in the loras folder.
        on: Whether the LoRA is used.
        strength: Strength on the diffusion model.
        clip: Strength on the text encoders; ``None`` for that on the model.
        words: Words that call for it in a prompt, separated by commas; ``""`` for the trigger words in its file.
        start, end: Part of the sampling steps in which it acts, 0 .. 1.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    name: str
    on: bool = True
    strength: float = Field(1.0, ge=-100, le=100)
    clip: float | None = Field(None, ge=-100, le=100)
    words: str = ""
    start: float = Field(0.0, ge=0, le=1)
    end: float = Field(1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _starts_before_it_ends(self) -> Entry:
        if self.start >= self.end:
            raise ValueError("start must be before end")
        return self


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
    """Names several LoRA files and their strengths, and applies them where a model is connected."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_LoRAList",
            display_name="LoRA List",
            category=CATEGORY,
            essentials_category=ESSENTIALS,
            description="Several LoRA files in one list, with search, strengths, switches, and order by dragging. With "
            "MODEL and CLIP it is a loader; without, a stack for LEGO Merge, MoLE Mix, and nodes of other packs.",
            search_aliases=[
                *("lora loader", "lora stack", "power lora loader", "multi lora", "multiple loras", "lora manager"),
                *("lora stacker", "regional lora", "legomole"),
            ],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                _LIST.Input("loras", tooltip="The LoRAs, in order. Those switched off are not used."),
                LORA_STACK.Input(
                    "lora_stack", optional=True, tooltip="A stack to add these LoRAs to, also from other packs."
                ),
                io.Model.Input(
                    "model",
                    optional=True,
                    tooltip="A model to apply the LoRAs to, those of lora_stack first.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="Its text encoders, for LoRAs that also change those."),
                io.Combo.Input(
                    "apply",
                    options=list(_WAYS),
                    default="chain",
                    optional=True,
                    tooltip="How the LoRAs are applied to a connected model. chain: one after the other, as stock "
                    "loaders do. mix: as MoLE Mix with its defaults, so with CLIP each LoRA follows its "
                    "words; LoRAs with a start or end step need it. merge: as LEGO Merge with its defaults.",
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
                    tooltip="The words of the LoRAs that are on, one line each: those of the row, or the trigger words "
                    "in or beside the file.",
                ),
                io.Model.Output("MODEL", tooltip="The model with the LoRAs; empty if none is connected."),
                io.Clip.Output("CLIP", tooltip="The text encoders with the LoRAs; empty if none are connected."),
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
    def execute(
        cls, loras: str, lora_stack: Stack | None = None, model: Any = None, clip: Any = None, apply: str = "chain"
    ) -> io.NodeOutput:
        used = [entry for entry in parse_entries(loras) if entry.on]
        lines = [split_words(entry.words) or trigger_words(folders.lora_path(entry.name)) for entry in used]
        words = "\n".join(map(", ".join, lines))
        stack = list(lora_stack or [])
        for entry in used:
            clip_strength = entry.strength if entry.clip is None else entry.clip
            steps = entry.start, entry.end
            stack.append(StackEntry.of(entry.name, entry.strength, clip_strength, 0, split_words(entry.words), steps))
        if model is None:
            return io.NodeOutput(stack, words, None, clip)
        if not stack:
            shown = display.show_text("no LoRA is switched on: model and CLIP are passed on unchanged")
            return io.NodeOutput(stack, words, model, clip, ui=shown)
        model, clip, shown = _WAYS[apply](stack, model, clip)
        return io.NodeOutput(stack, words, model, clip, ui=shown)


def _chain(stack: Stack, model: Any, clip: Any) -> tuple[Any, Any, Any]:
    """Apply the LoRAs of a stack one after the other."""
    for lora in connected_loras({"stack": stack}, folders.lora_path, may_be_none=True):
        model, clip = lora_loader.apply(lora, model, clip, 1.0, 1.0)
    return model, clip, None


def _mix(stack: Stack, model: Any, clip: Any) -> tuple[Any, Any, Any]:
    """Apply a stack as MoLE Mix does with its defaults."""
    output = MoLEMix.execute(model, {"stack": stack}, 1.0, "delta", "block", "concat", clip=clip)
    return output.args[0], output.args[1], output.ui


def _merge(stack: Stack, model: Any, clip: Any) -> tuple[Any, Any, Any]:
    """Merge a stack as LEGO Merge does with its defaults, and apply the result."""
    output = LegoMerge.execute({"stack": stack}, model=model, clip=clip)
    return *lora_loader.apply(output.args[0], model, clip, 1.0, 1.0), output.ui


_WAYS = {"chain": _chain, "mix": _mix, "merge": _merge}
