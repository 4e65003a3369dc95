"""The socket types our nodes speak, and the inputs several of them share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ..core.merge.methods import MergeMethod
from .settings import Setting, settings

LEGOMOLE_LORA = io.Custom("LEGOMOLE_LORA")  # a `Lora`
LEGOMOLE_GATES = io.Custom("LEGOMOLE_GATES")  # `core.mole.trained.TrainedGates`
LEGOMOLE_STATISTICS = io.Custom("LEGOMOLE_STATISTICS")  # `core.merge.statistics.Statistics`
LORA_MODEL = io.Custom("LORA_MODEL")  # ComfyUI's own: the state dict that Train LoRA returns
LORA_STACK = io.Custom("LORA_STACK")  # other packs' convention: [(file name, strength_model, strength_clip), ..]

CATEGORY = "LegoMoLE"


def strength(name: str, tooltip: str) -> Any:
    """A strength slider with the stock loader's range."""
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip)


def loras_input() -> Any:
    """The growing row of LoRA sockets."""
    one = io.MultiType.Input(
        "lora",
        [LEGOMOLE_LORA, LORA_MODEL, LORA_STACK],
        tooltip="A LoRA from Load LoRA or another merge, one trained in this graph (LORA_MODEL), or a whole "
        "LORA_STACK, which counts as its entries. Strengths come with the LoRAs.",
    )
    return io.Autogrow.Input(
        "loras",
        # none is required by itself: any one of them may be muted or bypassed
        template=io.Autogrow.TemplatePrefix(one, prefix="lora", min=0, max=50),
        tooltip="The LoRAs. A new socket appears as you connect the last one.",
    )


def words_input() -> Any:
    """What prompts call each LoRA; `train_gates.concepts_of` reads it."""
    return io.String.Input(
        "words",
        default="",
        multiline=True,
        tooltip="One line per LoRA, in their order: the words that name it in a prompt, separated by "
        "commas. An empty line takes the trigger words from the file.",
    )


def painting_inputs() -> list[Any]:
    """How the pictures are painted that a node learns from."""
    return [
        io.Int.Input(
            "sampling_steps", default=12, min=1, max=1000, advanced=True, tooltip="Of painting those pictures."
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=1.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance of those pictures, as you sample this model: 1 for Flux and for distilled models.",
        ),
    ]


def seed_input(tooltip: str, **options: Any) -> Any:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=2**31 - 1,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
        **options,
    )


def model_inputs() -> list[Any]:
    """MODEL and CLIP, through which any LoRA that ComfyUI can load becomes mergeable."""
    return [
        io.Model.Input(
            "model",
            optional=True,
            tooltip="The base model. With it, any LoRA ComfyUI can load into it can be merged, whatever tool wrote it.",
        ),
        io.Clip.Input("clip", optional=True, tooltip="Its text encoders, for LoRAs that also train those."),
    ]


def module_weights_input() -> Any:
    return io.String.Input(
        "module_weights",
        default="",
        multiline=True,
        optional=True,
        advanced=True,
        tooltip="Weights per layer, one rule a line: '*attn2* = 0.5' for every LoRA, '2: *single_blocks* = 0' to keep "
        "the second out of some layers, '1: * = 0.8' for a LoRA's overall strength.",
    )


def widget(setting: Setting, advanced: bool = False) -> Any:
    """The input for a merge method's setting."""
    common = {"tooltip": setting.tooltip, "advanced": advanced}
    if setting.kind == "rank":
        return io.String.Input(setting.name, default=setting.default, **common)
    if setting.kind == "choice":
        return io.Combo.Input(setting.name, options=list(setting.choices), default=setting.default, **common)
    if setting.kind == "number":
        return io.Float.Input(setting.name, default=setting.default, min=0.0, max=100.0, step=0.05, **common)
    if setting.kind == "share":
        return io.Float.Input(setting.name, default=setting.default, min=0.0, max=1.0, step=0.01, **common)
    if setting.name == "seed":
        return seed_input(setting.tooltip, advanced=advanced)
    return io.Int.Input(setting.name, default=setting.default, min=0, max=100, **common)


def method_input(methods: Mapping[str, type[MergeMethod]], tooltip: str) -> Any:
    """A choice of merge methods, each with its settings; `settings.built` takes what it gives."""
    return io.DynamicCombo.Input(
        "method",
        options=[
            io.DynamicCombo.Option(name, [widget(setting) for setting in settings(method)])
            for name, method in methods.items()
        ],
        tooltip=tooltip,
    )


def statistics_input() -> Any:
    return LEGOMOLE_STATISTICS.Input(
        "statistics",
        optional=True,
        tooltip="From Calibrate, with the same LoRAs and the same model: then the merge acts like each LoRA where that "
        "one is asked for, and leaves the model alone elsewhere.",
    )


def lora_output(tooltip: str) -> Any:
    return LEGOMOLE_LORA.Output("lora", display_name="lora", tooltip=tooltip)
