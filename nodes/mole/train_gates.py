"""Train Gates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ...core.errors import MergeError
from ...core.merge.methods import METHODS
from ...core.mole.gates import GateSettings
from ...core.pictures.charts import curves
from ...core.train import TrainingResult, TrainSettings, prompts_for
from ..comfy import lora_loader, mixes, program, training
from ..lora import Lora, flatten
from ..sockets import CATEGORY, LEGOMOLE_GATES, loras_input, painting_inputs, seed_input, words_input
from .mole import GRANULARITIES

_LOG = logging.getLogger(__name__)


class TrainGates(io.ComfyNode):
    """Teach gates which LoRA a prompt asks for, without any images."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        latents = io.Autogrow.TemplatePrefix(
            io.Latent.Input("latents", tooltip="Pictures of this LoRA's own subject or style, encoded; one batch."),
            prefix="latents",
            min=0,
            max=50,
        )
        captions = io.Autogrow.TemplatePrefix(
            io.Conditioning.Input("captions", tooltip="An encoded prompt for the pictures of this LoRA."),
            prefix="captions",
            min=0,
            max=50,
        )
        return io.Schema(
            node_id="LegoMoLE_TrainGates",
            display_name="Train Gates",
            category=CATEGORY,
            description="Trains the gates of a mix from the models' own pictures: gates learn to let in the LoRAs a "
            "prompt names, and none where it names none. Takes a minute or two, needs no images.",
            search_aliases=["mole training", "train mixture of lora experts", "legomole"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the LoRAs."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                loras_input(),
                words_input(),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size to train at, e.g. 512 x 512."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts to learn from, one a line: with one LoRA's words, with several, with none. Left "
                    "empty, they are made from the words. Prompts unlike all of these may be read wrongly.",
                ),
                io.Combo.Input(
                    "objective",
                    options=["distil", "denoise", "router"],
                    default="distil",
                    tooltip="What the gates learn. distil: best for most; needs no images. denoise: if you have images "
                    "of each LoRA's subject or style; connect latents. router: gates that follow the words, in "
                    "seconds and without training; for a first try.",
                ),
                io.Combo.Input(
                    "granularity",
                    options=GRANULARITIES,
                    default="layer",
                    tooltip="Parts of the model with a gate of their own: the whole, a block, an attention or "
                    "feed-forward, a weight matrix.",
                ),
                io.Combo.Input(
                    "activation",
                    options=["sigmoid", "softmax", "softmax-null"],
                    default="sigmoid",
                    advanced=True,
                    tooltip="sigmoid: every LoRA has a gate of its own, all may be shut. softmax: they share out 1, as "
                    "published. softmax-null: the same, with a share for none of them.",
                ),
                io.Combo.Input(
                    "reads",
                    options=["text", "hidden", "experts"],
                    default="text",
                    advanced=True,
                    tooltip="What a gate decides by. text: the prompt; best for most. hidden: the layer's input; gates "
                    "may change from step to step. experts: what the LoRAs add, as in the paper.",
                ),
                io.Int.Input("steps", default=200, min=1, max=100000, tooltip="TrainingResult steps."),
                io.Int.Input("batch_size", default=8, min=1, max=1024, tooltip="Examples per step. Costs memory."),
                io.Float.Input(
                    "learning_rate", default=0.01, min=1e-7, max=1.0, step=1e-4, tooltip="At its peak; falls to 0."
                ),
                io.Float.Input(
                    "balance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Weight of the balance loss, which keeps any LoRA from being starved. The paper has 0.5, "
                    "for softmax gates.",
                ),
                io.Int.Input(
                    "pictures",
                    default=32,
                    min=1,
                    max=10000,
                    advanced=True,
                    tooltip="How many pictures the models paint.",
                ),
                io.Int.Input(
                    "examples",
                    default=256,
                    min=1,
                    max=100000,
                    advanced=True,
                    tooltip="How many noised versions of them the gates learn from.",
                ),
                *painting_inputs(),
                io.Float.Input(
                    "compose",
                    default=1.2,
                    min=0.1,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How strong the sum is that is imitated where a prompt names several LoRAs.",
                ),
                io.Boolean.Input(
                    "save_memory",
                    default=True,
                    advanced=True,
                    tooltip="Compute blocks again in the backward pass instead of keeping all they computed.",
                ),
                seed_input("Of everything drawn. The same seed gives the same gates."),
                io.Autogrow.Input(
                    "latents",
                    template=latents,
                    optional=True,
                    tooltip="For denoise: one batch of encoded pictures per LoRA, in the LoRAs' order.",
                ),
                io.Autogrow.Input(
                    "captions",
                    template=captions,
                    optional=True,
                    tooltip="For denoise: what describes the pictures of each LoRA. Default: prompts with its words.",
                ),
            ],
            outputs=[
                LEGOMOLE_GATES.Output("gates", display_name="gates", tooltip="For MoLE Mix and Save Gates."),
                io.Image.Output("IMAGE", tooltip="Loss and entropy of the gates, step by step."),
                io.String.Output("report", display_name="report", tooltip="How the training went."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        loras: dict[str, Any],
        words: str,
        latent_image: Mapping[str, Any],
        objective: str,
        granularity: str,
        activation: str,
        reads: str,
        steps: int,
        batch_size: int,
        learning_rate: float,
        balance: float,
        pictures: int,
        examples: int,
        sampling_steps: int,
        cfg: float,
        compose: float,
        save_memory: bool,
        seed: int,
        prompts: str | None = None,
        latents: dict[str, Any] | None = None,
        captions: dict[str, Any] | None = None,
    ) -> io.NodeOutput:
        values = flatten(loras, program.lora_path)
        concepts = concepts_of(words, values)
        asked = prompts_for(concepts, (prompts or "").splitlines())
        gate = GateSettings.model_validate({"granularity": granularity, "activation": activation, "reads": reads})
        settings = TrainSettings.model_validate(
            {
                "objective": objective,
                "steps": steps,
                "batch": batch_size,
                "learning_rate": learning_rate,
                "balance": balance,
                "samples": pictures,
                "examples": examples,
                "compose": compose,
                "seed": seed,
            }
        )
        mix = mixes.build(values, model, clip, settings=gate)
        text_encoders = mixes.on_clip(mix, model, clip, METHODS["concat"]())
        done = training.train_gates(
            mix,
            model,
            text_encoders,
            latent_image["samples"],
            asked,
            concepts,
            settings,
            cfg=cfg,
            sampling_steps=sampling_steps,
            checkpointing=save_memory,
            images={i: latent["samples"] for i, latent in _by_lora("latents", latents, len(values)).items()},
            captions=_by_lora("captions", captions, len(values)),
            folder=program.unfinished_folder(),
            progress=program.told_progress(),
            keep=_keep,
        )
        fit = done.fit
        text = told(done)
        drawn = curves({"loss": fit.losses, "entropy": fit.entropies}, f"TrainingResult the gates: {objective}")
        return io.NodeOutput(done.gates, program.picture(drawn), text, ui=program.show(text))


def _keep(partly: TrainingResult) -> None:
    """A cancelled training: what it learnt becomes a file of its own, beside the state it can go on from."""
    path = program.save_path("interrupted", program.GATES)
    partly.gates.save(path)
    text = f"{partly.fit.stopped}: queue again to go on. What was learnt so far is in {path.name} (Load Gates)."
    _LOG.warning("LegoMoLE: %s", text)
    program.show(text)


def told(done: TrainingResult) -> str:
    """How a training went, for people."""
    fit, labels = done.fit, [expert.label for expert in done.gates.experts]
    names = done.gates.gates.names
    lines = [f"{len(names)} gates for {', '.join(labels)}"]
    if fit.losses:
        lines.append(
            f"loss {fit.losses[0]:.4g} at the first step, {fit.losses[-1]:.4g} at the last of {len(fit.losses)}"
        )
        lines.append(f"entropy of the gates {fit.entropies[0]:.3g} to {fit.entropies[-1]:.3g} nats")
    if fit.stopped:
        lines.append(f"STOPPED: {fit.stopped}")
    return "\n".join(lines)


def concepts_of(words: str, loras: Sequence[Lora]) -> list[list[str]]:
    """The words of each LoRA: a line of the widget, or the trigger words of its file where the line is empty.

    Raises:
        MergeError: More lines than LoRAs.
    """
    lines = words.rstrip().splitlines()
    if len(lines) > len(loras):
        raise MergeError(
            "There are more lines of words than LoRAs.",
            expected=f"{len(loras)} lines, one per LoRA",
            found=f"{len(lines)} lines",
            remedy="put all words of a LoRA on one line, separated by commas",
        )
    lines += [""] * (len(loras) - len(lines))
    return [
        [word.strip() for word in (line.strip() or lora_loader.trigger_words(lora)).split(",") if word.strip()]
        for line, lora in zip(lines, loras, strict=True)
    ]


def _by_lora(row: str, values: Mapping[str, Any] | None, experts: int) -> dict[int, Any]:
    """What is connected to a growing row, by the position of the LoRA it belongs to.

    Raises:
        MergeError: Something is connected past the last LoRA.
    """
    found = {int(name.removeprefix(row)): value for name, value in (values or {}).items() if value is not None}
    if found and max(found) >= experts:
        raise MergeError(
            f"More {row} are connected than LoRAs.", expected=f"at most {experts}", found=f"{row}{max(found)}"
        )
    return dict(sorted(found.items()))
