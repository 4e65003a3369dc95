"""MoLE Mix, Freeze to LoRA and Gate Map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui

from ...core.adapter import Source
from ...core.errors import MergeError
from ...core.merge.methods import METHODS
from ...core.mole.freeze import freeze
from ...core.mole.gates import GateSettings
from ...core.mole.mixture import MixMode
from ...core.mole.trained import TrainedGates
from ...core.pictures.gate_map import gate_map
from ...core.recipes.method_settings import build_method
from ..comfy import mixes, program, sampling
from ..lora import Lora, flatten
from ..settings import built, has_widgets
from ..sockets import CATEGORY, LEGOMOLE_GATES, lora_output, loras_input, method_input

GRANULARITIES = ["network", "block", "layer", "matrix"]
# Exact first: what a chain of loaders would do.
_FREEZING = {name: METHODS[name] for name in ("concat", *METHODS) if has_widgets(METHODS[name])}


class MoLEMix(io.ComfyNode):
    """Several LoRAs on a model, each as strong as a gate says, block by block and prompt by prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_MoLEMix",
            display_name="MoLE Mix",
            category=CATEGORY,
            description="Use several LoRAs at once, mixed by gates while the model runs (Mixture of LoRA Experts). "
            "Without trained gates it acts as a chain of loaders.",
            search_aliases=[
                "mixture of lora experts",
                "mole",
                "gated lora",
                "combine loras",
                "lora loader",
                "legomole",
            ],
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model to put the LoRAs on."),
                loras_input(),
                LEGOMOLE_GATES.Input(
                    "gates",
                    optional=True,
                    tooltip="From Train Gates or Load Gates. Without any, every LoRA goes in evenly.",
                ),
                io.String.Input(
                    "switched_off",
                    default="",
                    optional=True,
                    tooltip="Numbers or names of LoRAs to leave out this time, e.g. 2 or 1, style. Nothing is "
                    "retrained.",
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Multiplies all strengths. Softmax gates share out 1 among the LoRAs: try their number.",
                ),
                io.Combo.Input(
                    "mixing",
                    options=["delta", "output"],
                    default="delta",
                    advanced=True,
                    tooltip="delta: add the gated LoRAs in every layer, nearly free. output: run every block once per "
                    "LoRA and mix what comes out; needs gates per block.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=GRANULARITIES,
                    default="block",
                    advanced=True,
                    tooltip="Parts of the model with a gate of their own. Trained gates bring theirs.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="The text encoders, for LoRAs that also train those."),
                io.Combo.Input(
                    "clip_method",
                    options=list(_FREEZING),
                    default="concat",
                    advanced=True,
                    tooltip="How the LoRAs' text encoder parts are merged: gates rule the diffusion model only. concat "
                    "is the exact sum.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The model with the mix on it, for any sampler."),
                io.Clip.Output(
                    "CLIP", tooltip="The text encoders with the LoRAs' parts; empty when none were connected."
                ),
                io.String.Output("report", display_name="report", tooltip="What is mixed, and what could not be."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        loras: dict[str, Any],
        scale: float,
        mixing: MixMode,
        granularity: str,
        clip_method: str,
        gates: TrainedGates | None = None,
        switched_off: str | None = None,
        clip: Any = None,
    ) -> io.NodeOutput:
        values = flatten(loras, program.lora_path)
        mix = mixes.build(
            values,
            model,
            clip,
            gates=gates,
            settings=GateSettings.model_validate({"granularity": granularity}),
            scale=scale,
            mixing=mixing,
            off=switched(switched_off or "", [lora.label for lora in values]),
        )
        patched = mixes.on_model(mix, model)
        text_encoders = mixes.on_clip(mix, model, clip, build_method(clip_method, {}))
        text = mix.text()
        shown = {**program.show(text).as_dict(), "experts": [lora.label for lora in values]}  # web/mask_strip.js
        return io.NodeOutput(patched, text_encoders, text, ui=shown)


def switched(text: str, labels: Sequence[str]) -> list[int]:
    """Positions of LoRAs named by number (from 1) or by label: ``2`` or ``1, style``.

    Raises:
        MergeError: A number or name that no LoRA has.
    """
    found: list[int] = []
    for word in (word.strip() for word in text.split(",")):
        if not word:
            continue
        at = [i for i, label in enumerate(labels) if word in (label, str(i + 1))]
        if not at:
            raise MergeError(
                "There is no such LoRA to switch off.",
                expected=", ".join(f"{i + 1} ({label})" for i, label in enumerate(labels)),
                found=word,
            )
        found += at
    return found


class FreezeToLoRA(io.ComfyNode):
    """A mix as one ordinary LoRA: gates at their mean over a sampling run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_FreezeToLoRA",
            display_name="Freeze to LoRA",
            category=CATEGORY,
            description="Samples once with a mix, and makes one ordinary LoRA of it with every gate at its mean. It no "
            "longer follows the prompt, but any tool loads it.",
            search_aliases=["mole to lora", "bake gates", "export mix", "legomole"],
            inputs=[
                io.Model.Input("model", tooltip="A model with a mix on it (of several, the last is frozen)."),
                io.Conditioning.Input("positive", tooltip="The prompt to freeze the gates for."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size you paint."),
                method_input(
                    _FREEZING,
                    "How the LoRAs are merged at those gates. concat: exactly, with the ranks added up. The others "
                    "keep a rank you choose.",
                ),
                io.Int.Input("steps", default=8, min=1, max=1000, tooltip="Sampling steps to average the gates over."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**63 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the picture the gates are averaged over.",
                ),
            ],
            outputs=[
                lora_output("The frozen LoRA: connect it to Apply LoRA or Save LoRA."),
                io.String.Output("report", display_name="report", tooltip="What was merged, and what freezing lost."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent_image: Mapping[str, Any], method: dict[str, Any], steps: int, seed: int
    ) -> io.NodeOutput:
        mix = mixes.mixes_of(model)[-1]
        report = program.progress()
        sampling.sample(  # for the record; the picture is not kept
            model,
            positive,
            positive,
            latent_image,
            seed=seed,
            steps=steps,
            cfg=1.0,  # only the prompt itself: its gates are what is wanted
            progress=lambda done: report(done, steps, "sampling"),
        )
        result = freeze(
            mix.mixture,
            mix.bank,
            mix.record,
            built(_FREEZING, method),
            text_encoder_weights=mix.text_encoder_weights,
            progress=program.progress(),
        )
        label = f"frozen({', '.join(mix.mixture.labels)})"
        adapter = replace(mix.reading.finish(result.adapter), source=Source(label, format="comfy"))
        text = result.report.text()
        return io.NodeOutput(Lora(adapter, label), text, ui=program.show(text))


class GateMap(io.ComfyNode):
    """What the gates of a mix did in the last sampling run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_GateMap",
            display_name="Gate Map",
            category=CATEGORY,
            description="Draws how much of each LoRA went in, part of the model by part and step by step, in the last "
            "sampling run.",
            search_aliases=["mole heat map", "gate heatmap", "expert weights", "legomole"],
            is_output_node=True,  # it shows its picture itself
            inputs=[
                io.Model.Input("model", tooltip="The model with the mix that was sampled with."),
                io.MultiType.Input(
                    "after",
                    [io.Latent, io.Image],
                    tooltip="What the sampling gave (LATENT or IMAGE): the map is drawn after it.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    tooltip="Rows are parts of the model, columns LoRAs; 1 is a LoRA's own strength. Below it how that "
                    "changed while sampling.",
                ),
                io.String.Output("report", display_name="report", tooltip="Mean weight of each LoRA, and the entropy."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, after: Any) -> io.NodeOutput:
        mix = mixes.mixes_of(model)[-1]
        record, labels = mix.record, mix.mixture.labels
        table = record.table()  # (passes, scopes, N)
        names = [scope or "outside of blocks" for scope in record.scopes]
        if mix.mixture.gates.settings.granularity == "network":
            names = ["network"]
        means = ", ".join(f"{label} {float(g):.3g}" for label, g in zip(labels, table.mean((0, 1)), strict=True))
        text = f"mean gates: {means}; entropy {record.entropy():.3g} nats over {len(table)} passes"
        image = program.picture(gate_map(table, names, labels))
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))
