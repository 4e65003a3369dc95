"""MoLE Mix, Freeze to LoRA and Gate Map."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from comfy_api.latest import io, ui
from torch import Tensor

from ...core.adapter import Source
from ...core.errors import MergeError
from ...core.merge.methods import METHODS
from ...core.mole.freeze import freeze, require_whole
from ...core.mole.gates import GateSettings
from ...core.mole.mixture import MixMode
from ...core.mole.trained import TrainedGates
from ...core.pictures.canvas import Canvas
from ...core.pictures.gate_map import gate_map
from ...core.recipes.method_settings import build_method
from ..comfy import display, folders, mixture, sampling, word_router
from ..graph_lora import GraphLora, connected_loras
from ..merge.recorded import with_possible_rank
from ..settings import method_from_widgets, works_without_statistics
from ..sockets import (
    CATEGORY,
    ESSENTIALS,
    GRANULARITIES,
    LEGOMOLE_GATES,
    LEGOMOLE_REGIONS,
    NamedRegion,
    by_lora,
    lora_output,
    loras_input,
    method_input,
    refuse_unknown,
    regions_input,
    report_output,
    seed_input,
)
from ..words import words_input, words_of_loras

# concat is the default: it is exact, like a chain of loaders
_FREEZE_METHODS = {name: METHODS[name] for name in ("concat", *METHODS) if works_without_statistics(METHODS[name])}


class MoLEMix(io.ComfyNode):
    """Mixes several LoRAs on a model by gates, per block and per prompt."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_MoLEMix",
            display_name="MoLE Mix",
            category=CATEGORY,
            essentials_category=ESSENTIALS,
            description="Use several LoRAs at once, mixed by gates while the model runs (Mixture of LoRA Experts). "
            "Without trained gates it acts like a chain of loaders.",
            search_aliases=[
                "mixture of lora experts",
                "mole",
                "gated lora",
                "moe lora",
                "x-lora",
                "regional lora",
                "attention couple",
                "masked lora",
                "lora schedule",
                "combine loras",
                "lora loader",
                "legomole",
            ],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, without the LoRAs."),
                loras_input(),
                regions_input(),
                LEGOMOLE_GATES.Input(
                    "gates",
                    optional=True,
                    tooltip="From Train Gates or Load Gates. Without gates every LoRA is used at its own strength.",
                ),
                io.String.Input(
                    "switched_off",
                    default="",
                    optional=True,
                    tooltip="LoRAs to leave out, by number or name, e.g. 2 or 1, style. The gates need no new "
                    "training.",
                ),
                words_input(
                    "Without gates, and with CLIP connected: each LoRA comes in only for prompts that contain its "
                    "words; a LoRA without words is always on.",
                    optional=True,
                ),
                io.Float.Input(
                    "scale",
                    default=1.0,
                    min=-10.0,
                    max=10.0,
                    step=0.01,
                    tooltip="Factor on all strengths. With softmax gates, which add up to 1, try the number of LoRAs.",
                ),
                io.Combo.Input(
                    "mixing",
                    options=["delta", "output"],
                    default="delta",
                    advanced=True,
                    tooltip="delta: add the gated LoRAs in each layer; fast. output: run each block once per LoRA and "
                    "mix the outputs, as in the paper; slow, and needs gates per block.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=GRANULARITIES,
                    default="block",
                    advanced=True,
                    tooltip="How large a part of the model shares one gate. Ignored with trained gates, which have "
                    "their own.",
                ),
                io.Clip.Input(
                    "clip",
                    optional=True,
                    tooltip="The text encoders: for LoRAs that also change those, and to let LoRAs follow their words.",
                ),
                io.Combo.Input(
                    "clip_method",
                    options=list(_FREEZE_METHODS),
                    default="concat",
                    advanced=True,
                    tooltip="How the LoRAs are merged in the text encoders, which have no gates. concat is their exact "
                    "sum.",
                ),
                io.Boolean.Input(
                    "automatic_regions",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Find the regions of LoRAs that a prompt names together, from the model's attention to "
                    "their words in the first quarter of the steps. Needs words and CLIP, or gates that read text.",
                ),
                LEGOMOLE_REGIONS.Input(
                    "named_regions",
                    optional=True,
                    tooltip="Regions that name their LoRAs, from Region. They keep to them when rows of the list are "
                    "moved or switched off.",
                ),
            ],
            outputs=[
                io.Model.Output("MODEL", tooltip="The model with the mix, for any sampler."),
                io.Clip.Output("CLIP", tooltip="The text encoders with the LoRAs; empty if none are connected."),
                report_output("What is mixed, and what could not be."),
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
        words: str | None = None,
        switched_off: str | None = None,
        clip: Any = None,
        regions: dict[str, Any] | None = None,
        automatic_regions: bool = False,
        named_regions: Sequence[NamedRegion] = (),
        **unknown: Any,
    ) -> io.NodeOutput:
        refuse_unknown(unknown)
        values = connected_loras(loras, folders.lora_path, may_be_none=True)
        labels = [lora.label for lora in values]
        if not values:
            return _passed_through(model, clip, labels, "no LoRA is connected or switched on")
        off = _parse_switched_off(switched_off or "", labels)
        if len(set(off)) == len(values):
            return _passed_through(model, clip, labels, "every LoRA is switched off")
        masks = by_lora("regions", regions, len(values), prefix="region", first=1)
        masks, left_over = _with_named(masks, named_regions, values)
        if automatic_regions and (masks or named_regions):
            raise MergeError(
                "Regions are either automatic or drawn.", remedy="switch automatic_regions off, or remove the masks"
            )
        concepts = words_of_loras(words or "", values)
        mix = mixture.build_mixture(
            values,
            model,
            clip,
            gates=gates,
            settings=GateSettings.model_validate({"granularity": granularity}),
            scale=scale,
            mixing=mixing,
            switched_off=off,
            regions="automatic" if automatic_regions else [masks.get(i) for i in range(len(values))],
            steps=[lora.steps for lora in values],
        )
        text_encoders = mixture.apply_to_clip(mix, model, clip, build_method(clip_method, {}))
        notes = () if gates is None else gates.notes
        if gates is None and clip is not None and any(concepts):
            active = [names for i, names in enumerate(concepts) if i not in off]
            mix, notes = word_router.with_router(mix, model, clip, text_encoders, active, display.progress_bar())
        elif any(concepts) and clip is None and gates is None:
            notes = ("connect CLIP to let each LoRA come in only for prompts that contain its words",)
        patched = mixture.apply_to_model(mix, model)
        text = "\n".join([mix.report(), *(f"  note: {note}" for note in (*notes, *left_over))])
        text_encoders = word_router.warn_about_prompts(mix, model, text_encoders, text)
        shown = {**display.show_text(text).as_dict(), "experts": labels}  # web/mask_strip.js reads the labels
        return io.NodeOutput(patched, text_encoders, text, ui=shown)


def _with_named(
    masks: Mapping[int, Tensor], named: Sequence[NamedRegion], loras: Sequence[GraphLora]
) -> tuple[dict[int, Tensor], list[str]]:
    """Add regions that name their LoRAs to masks by the positions of LoRAs.

    Returns:
        All masks by the positions of LoRAs; a note for each region whose LoRA is not there.

    Raises:
        MergeError: A LoRA with two regions.
    """
    joined, notes = dict(masks), []
    for region in named:
        positions = [i for i, lora in enumerate(loras) if lora.content == region.path]
        if not positions:
            notes.append(f"the region of {region.name} is not used: that LoRA is not in this mix, or its row is off")
        for i in positions:
            if i in joined:
                raise MergeError(
                    f"{loras[i].label} has two regions.",
                    expected="one, by name or by number",
                    remedy="disconnect one; or join their masks (Mask Composite, operation add) before Region",
                )
            joined[i] = region.mask
    return joined, notes


def _passed_through(model: Any, clip: Any, labels: Sequence[str], reason: str) -> io.NodeOutput:
    """Return the outputs of a mix of no LoRAs, as every LoRA loader does."""
    text = f"{reason}: model and CLIP are passed on unchanged"
    shown = {**display.show_text(text).as_dict(), "experts": list(labels)}
    return io.NodeOutput(mixture.pass_through(model), clip, text, ui=shown)


def _parse_switched_off(text: str, labels: Sequence[str]) -> list[int]:
    """Return the positions of LoRAs given by number (from 1) or label: ``2`` or ``1, style``.

    Raises:
        MergeError: A number or label that no LoRA has.
    """
    positions: list[int] = []
    for word in (word.strip() for word in text.split(",")):
        if not word:
            continue
        matching = [i for i, label in enumerate(labels) if word in (label, str(i + 1))]
        if not matching:
            raise MergeError(
                "There is no such LoRA to switch off.",
                expected=", ".join(f"{i + 1} ({label})" for i, label in enumerate(labels)),
                found=word,
            )
        positions += matching
    return positions


class FreezeToLoRA(io.ComfyNode):
    """Merges a mix into one ordinary LoRA, with each gate at its mean over a sampling run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_FreezeToLoRA",
            display_name="Freeze to LoRA",
            category=CATEGORY,
            description="Samples once with a mix, and makes one ordinary LoRA of it with each gate at its mean. The "
            "LoRA no longer follows the prompt, but any tool can load it.",
            search_aliases=["mole to lora", "bake gates", "export mix", "legomole"],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                io.Model.Input("model", tooltip="A model with a mix (of several, the last is frozen)."),
                io.Conditioning.Input("positive", tooltip="The prompt to freeze the gates for."),
                io.Latent.Input("latent_image", tooltip="An empty latent of the image size you will use."),
                method_input(
                    _FREEZE_METHODS,
                    "How the LoRAs are merged. concat: exactly, with the ranks added up. The others keep the rank you "
                    "choose.",
                ),
                io.Int.Input(
                    "steps", default=8, min=1, max=1000, tooltip="Number of sampling steps to average the gates over."
                ),
                seed_input("Random seed of the image that is sampled.", 2**63 - 1),
            ],
            outputs=[
                lora_output("The frozen LoRA. Connect it to Apply LoRA or Save LoRA."),
                report_output("What was merged, and what was lost."),
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent_image: Mapping[str, Any], method: dict[str, Any], steps: int, seed: int
    ) -> io.NodeOutput:
        mixes = mixture.mixtures_of(model)
        if not mixes:
            text = "every LoRA of the mix is switched off: there is nothing to freeze"
            return io.NodeOutput(GraphLora.empty(), text, ui=display.show_text(text))
        mix, progress = mixes[-1], display.progress_bar()
        require_whole(mix.mixture)  # before an image is sampled
        sampling.sample(  # only the recorded gates are used
            model,
            positive,
            positive,
            latent_image,
            seed=seed,
            steps=steps,
            cfg=1.0,  # without guidance, because only the prompt's gates are needed
            progress=lambda done: progress(done, steps, "sampling"),
        )
        merge_method, notes = with_possible_rank(
            method_from_widgets(_FREEZE_METHODS, method),
            mix.mixture.experts,
            mix.mixture.strengths,
            mix.text_encoder_weights,
        )
        result = freeze(
            mix.mixture,
            mix.bank,
            mix.record,
            merge_method,
            text_encoder_weights=mix.text_encoder_weights,
            progress=display.progress_bar(),
        )
        label = f"frozen({', '.join(mix.mixture.labels)})"
        adapter = replace(mix.loaded.finish(result.adapter), source=Source(label, format="comfy"))
        text = replace(result.report, notes=(*notes, *result.report.notes)).text()
        return io.NodeOutput(GraphLora(adapter, label), text, ui=display.show_text(text))


class GateMap(io.ComfyNode):
    """Draws the gates of a mix over the last sampling run."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_GateMap",
            display_name="Gate Map",
            category=CATEGORY,
            description="Draws how strongly each LoRA was used in the last sampling run, per part of the model and per "
            "step; and while sampling, in which region of the picture each LoRA acts.",
            search_aliases=["mole heat map", "gate heatmap", "expert weights", "region preview", "legomole"],
            is_output_node=True,  # it shows its own image
            has_intermediate_output=True,  # also when its result is cached
            inputs=[
                io.Model.Input("model", tooltip="The model with the mix that was sampled with."),
                io.MultiType.Input(
                    "after",
                    [io.Latent, io.Image],
                    tooltip="The sampler's LATENT or an IMAGE made from it, so that the map is drawn after sampling.",
                ),
            ],
            outputs=[
                io.Image.Output(
                    "IMAGE",
                    tooltip="Rows are parts of the model, columns are LoRAs; 1 is a LoRA's own strength. Below: the "
                    "change during sampling.",
                ),
                report_output("Mean gate of each LoRA, the entropy, and the part of the picture of each region."),
            ],
        )

    @classmethod
    def execute(cls, model: Any, after: Any) -> io.NodeOutput:
        mixes = mixture.mixtures_of(model)
        if not mixes:
            text = "every LoRA of the mix is switched off: there are no gates"
            canvas = Canvas()
            canvas.text(14, 12, text)
            image = display.to_image(canvas.finish(canvas.text_width(text) + 28, 40))
            return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))
        mix = mixes[-1]
        record, labels = mix.record, mix.mixture.labels
        table = record.table()  # (passes, scopes, N)
        names = [scope or "outside of blocks" for scope in record.scopes]
        if mix.mixture.gates.settings.granularity == "network":
            names = ["network"]
        means = ", ".join(f"{label} {float(g):.3g}" for label, g in zip(labels, table.mean((0, 1)), strict=True))
        text = f"mean gates: {means}; entropy {record.entropy():.3g} nats over {len(table)} passes"
        mapped = ((label, map_) for label, map_ in zip(labels, record.maps, strict=False) if map_ is not None)
        if regions := ", ".join(f"{label} {float(map_.mean()):.0%}" for label, map_ in mapped):
            text += f"; regions: {regions} of the picture"
        image = display.to_image(gate_map(table, names, labels))
        return io.NodeOutput(image, text, ui=ui.PreviewImage(image, cls=cls))
