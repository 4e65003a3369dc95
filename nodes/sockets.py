"""Socket types, and the inputs and outputs that several nodes share."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from comfy_api.latest import io
from torch import Tensor

from ..core.errors import MergeError
from ..core.merge.methods import MergeMethod
from .settings import Setting, settings_of

LEGOMOLE_LORA = io.Custom("LEGOMOLE_LORA")  # a `GraphLora`
LEGOMOLE_GATES = io.Custom("LEGOMOLE_GATES")  # `core.mole.trained.TrainedGates`
LEGOMOLE_REGIONS = io.Custom("LEGOMOLE_REGIONS")  # a tuple of `NamedRegion`s
LEGOMOLE_STATISTICS = io.Custom("LEGOMOLE_STATISTICS")  # `core.merge.statistics.Statistics`
LORA_MODEL = io.Custom("LORA_MODEL")  # ComfyUI's own: the state dict that Train LoRA returns
LORA_STACK = io.Custom("LORA_STACK")  # other packs' convention: [(file name, strength_model, strength_clip), ..]

CATEGORY = "LegoMoLE"
ESSENTIALS = "Image Generation"  # where ComfyUI's own LoRA loader is among the essential nodes
GRANULARITIES = ["network", "block", "layer", "matrix"]


def strength_input(name: str, tooltip: str) -> Any:
    """A strength, with the stock loader's range."""
    return io.Float.Input(name, default=1.0, min=-100.0, max=100.0, step=0.01, tooltip=tooltip)


def loras_input() -> Any:
    """A growing row of LoRA sockets."""
    socket = io.MultiType.Input(
        "lora",
        [LEGOMOLE_LORA, LORA_MODEL, LORA_STACK],
        tooltip="A LoRA from Load LoRA or a merge, a LoRA trained in this graph (LORA_MODEL), or a LORA_STACK, which "
        "counts as several. Strengths come with the LoRAs.",
    )
    return io.Autogrow.Input(
        "loras",
        # min=0, because any of the connected nodes may be muted or bypassed
        template=io.Autogrow.TemplatePrefix(socket, prefix="lora", min=0, max=50),
        tooltip="The LoRAs. A new socket appears when you connect the last one.",
    )


def per_lora_input(name: str, socket: Any, tooltip: str) -> Any:
    """A growing row of optional sockets, one per LoRA."""
    template = io.Autogrow.TemplatePrefix(socket, prefix=name, min=0, max=50)
    return io.Autogrow.Input(name, template=template, optional=True, tooltip=tooltip)


def regions_input() -> Any:
    """A growing row of optional masks, numbered from 1 like the LoRAs on the node."""
    socket = io.Mask.Input(
        "region",
        tooltip="A mask, white where the LoRA of this number acts. The LoRAs are numbered on the switches below; those "
        "of a list count one each.",
    )
    template = io.Autogrow.TemplateNames(socket, names=[f"region{i}" for i in range(1, 51)], min=0)
    return io.Autogrow.Input(
        "regions",
        template=template,
        optional=True,
        tooltip="Where in the picture each LoRA acts: region1 is for the first LoRA. A LoRA without a mask acts "
        "everywhere.",
    )


class NamedRegion(NamedTuple):
    """A region with the LoRA file that acts in it.

    Args:
        name: The file's name in the graph. path: The file. mask: ``(K, H, W)``, see `Mixture`.
    """

    name: str
    path: Path
    mask: Tensor


def by_lora(
    row: str, values: Mapping[str, Any] | None, loras: int, *, prefix: str = "", first: int = 0
) -> dict[int, Any]:
    """Return what is connected to a growing row, by the position of its LoRA.

    Args:
        row: Name of the row.
        values: Socket name -> value.
        loras: Number of LoRAs.
        prefix: What the sockets' names begin with; default the name of the row.
        first: Number of the first socket.

    Raises:
        MergeError: Something is connected past the last LoRA.
    """
    prefix = prefix or row
    connected = {
        int(name.removeprefix(prefix)) - first: value for name, value in (values or {}).items() if value is not None
    }
    if connected and max(connected) >= loras:
        raise MergeError(
            f"More {row} are connected than LoRAs.",
            expected=f"at most {loras}, because that many LoRAs are connected and switched on",
            found=f"{prefix}{max(connected) + first}",
            remedy=f"disconnect it; or keep the LoRA switched on: a row of LoRA List that is off does not count, which "
            f"moves the {row} of the LoRAs after it"
            + (". Regions that name their LoRA (named_regions) do not move" if row == "regions" else ""),
        )
    return dict(sorted(connected.items()))


def refuse_unknown(inputs: Mapping[str, Any], known: Collection[str] = ()) -> None:
    """Raise if a prompt links an input that the node does not have, which ComfyUI passes on.

    Args:
        inputs: The inputs that `execute` received beyond its own parameters.
        known: Names that are valid.

    Raises:
        MergeError: Another name.
    """
    unknown = sorted(set(inputs) - set(known))
    if unknown:
        raise MergeError(
            "The node has no such input.",
            expected="loras.lora0, loras.lora1 .. for the sockets of LoRAs, regions.region1 .. for those of masks, and "
            "the names in /object_info",
            found=", ".join(unknown),
            remedy="change the name in the prompt that was sent to the server",
        )


def seed_input(tooltip: str, largest: int = 2**31 - 1, **options: Any) -> Any:
    """A seed with ComfyUI's "control after generate", which is off at first."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=largest,
        control_after_generate=io.ControlAfterGenerate.fixed,
        tooltip=tooltip,
        **options,
    )


def model_inputs() -> list[Any]:
    """An optional model, with which any LoRA can be merged that ComfyUI can load into it."""
    return [
        io.Model.Input(
            "model",
            optional=True,
            tooltip="The base model. With it, any LoRAs can be merged that ComfyUI can load into it.",
        ),
        io.Clip.Input("clip", optional=True, tooltip="Its text encoders, for LoRAs that also change those."),
    ]


def module_weights_input() -> Any:
    return io.String.Input(
        "module_weights",
        default="",
        multiline=True,
        optional=True,
        advanced=True,
        tooltip="Weights for some layers, one rule per line. '*attn2* = 0.5': every LoRA. '2: *single_blocks* = 0': "
        "not the second LoRA there. '1: * = 0.8': the first LoRA everywhere. Rules that match multiply.",
    )


def filename_input(folder: str, default: str) -> Any:
    """The name of a new file."""
    return io.String.Input(
        "filename_prefix",
        default=default,
        tooltip=f"Name in {folder}; a number is added, and existing files are kept. A subfolder and the date as "
        "%year%, %month%, %day% are allowed.",
    )


def setting_input(setting: Setting, advanced: bool = False) -> Any:
    """The input for a setting of a merge method."""
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
    """A choice of merge methods, each with its settings; `settings.method_from_widgets` reads the value."""
    return io.DynamicCombo.Input(
        "method",
        options=[
            io.DynamicCombo.Option(name, [setting_input(setting) for setting in settings_of(method)])
            for name, method in methods.items()
        ],
        tooltip=tooltip,
    )


def statistics_input() -> Any:
    return LEGOMOLE_STATISTICS.Input(
        "statistics",
        optional=True,
        tooltip="From Calibrate, with the same LoRAs and the same model. The merge then acts like each LoRA where a "
        "prompt asks for it, and changes little elsewhere.",
    )


def lora_output(tooltip: str) -> Any:
    return LEGOMOLE_LORA.Output("lora", display_name="lora", tooltip=tooltip)


def report_output(tooltip: str) -> Any:
    return io.String.Output("report", display_name="report", tooltip=tooltip)


def path_output() -> Any:
    return io.String.Output("path", display_name="path", tooltip="Path of the file that was written.")
