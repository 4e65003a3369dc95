"""Train Gates."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from comfy_api.latest import io

from ...core.mole.gates import GateSettings
from ...core.pictures.charts import curves
from ...core.train import TrainingResult, TrainSettings
from ..comfy import display, folders, training
from ..sockets import (
    CATEGORY,
    GRANULARITIES,
    LEGOMOLE_GATES,
    by_lora,
    per_lora_input,
    refuse_unknown,
    report_output,
    seed_input,
)
from .sampling_setup import model_and_prompt_inputs, sampling_inputs, sampling_setup

_LOG = logging.getLogger(__name__)


class TrainGates(io.ComfyNode):
    """Trains the gates of a mixture to open for the LoRAs that a prompt asks for."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_TrainGates",
            display_name="Train Gates",
            category=CATEGORY,
            description="Trains gates for MoLE Mix, so that a prompt uses the LoRAs it asks for and no others. Takes a "
            "minute or two and needs no images: the model samples its own.",
            search_aliases=["mole training", "train mixture of lora experts", "x-lora", "moe lora", "legomole"],
            has_intermediate_output=True,  # its text is shown again when its result is cached
            inputs=[
                *model_and_prompt_inputs(),
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
                    tooltip="How large a part of the model shares one gate: all of it (network), a block, an attention "
                    "or feed-forward (layer), or one weight matrix. layer is a good choice.",
                ),
                io.Combo.Input(
                    "activation",
                    options=["sigmoid", "softmax", "softmax-null"],
                    default="sigmoid",
                    advanced=True,
                    tooltip="sigmoid: best for most; each LoRA has its own gate, and all can be off. softmax: the "
                    "gates of all LoRAs add up to 1, as in the paper. softmax-null: they add up to 1 or less.",
                ),
                io.Combo.Input(
                    "reads",
                    options=["text", "hidden", "experts"],
                    default="text",
                    advanced=True,
                    tooltip="What a gate decides by. text: the prompt; best for most. hidden: the layer's input; gates "
                    "may change from step to step. experts: what the LoRAs add, as in the paper.",
                ),
                io.Int.Input("steps", default=200, min=1, max=100000, tooltip="Number of training steps."),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=1024,
                    tooltip="Examples per training step. Lower it if the GPU runs out of memory.",
                ),
                io.Float.Input(
                    "learning_rate",
                    default=0.01,
                    min=1e-7,
                    max=1.0,
                    step=1e-4,
                    tooltip="Highest learning rate; it falls to 0 at the end.",
                ),
                io.Float.Input(
                    "balance",
                    default=0.0,
                    min=0.0,
                    max=100.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Weight of the balance loss, which keeps gates from ignoring a LoRA. The paper uses 0.5 "
                    "with softmax.",
                ),
                io.Int.Input(
                    "pictures",
                    default=32,
                    min=1,
                    max=10000,
                    advanced=True,
                    tooltip="Number of images the model samples to learn from.",
                ),
                io.Int.Input(
                    "examples",
                    default=256,
                    min=1,
                    max=100000,
                    advanced=True,
                    tooltip="Number of training examples: these images at different noise levels.",
                ),
                *sampling_inputs(),
                io.Float.Input(
                    "compose",
                    default=1.2,
                    min=0.1,
                    max=10.0,
                    step=0.05,
                    advanced=True,
                    tooltip="Factor on the LoRAs' strengths for prompts that ask for several of them.",
                ),
                io.Boolean.Input(
                    "save_memory",
                    default=True,
                    advanced=True,
                    tooltip="Use less memory by computing each block twice. Slower.",
                ),
                seed_input("Random seed. The same seed gives the same gates."),
                per_lora_input(
                    "latents",
                    io.Latent.Input("latents", tooltip="Encoded images of this LoRA's subject or style, as a batch."),
                    "For denoise: one batch of encoded images per LoRA, in the order of the LoRAs.",
                ),
                per_lora_input(
                    "captions",
                    io.Conditioning.Input("captions", tooltip="An encoded prompt that describes this LoRA's images."),
                    "For denoise: a prompt that describes the images of each LoRA. Optional: without it prompts with "
                    "the LoRA's words are used.",
                ),
            ],
            outputs=[
                LEGOMOLE_GATES.Output(
                    "gates", display_name="gates", tooltip="Connect them to MoLE Mix, and to Save Gates to keep them."
                ),
                io.Image.Output("IMAGE", tooltip="A chart of the loss and of the gates' entropy."),
                report_output("How the training went."),
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
        **unknown: Any,
    ) -> io.NodeOutput:
        refuse_unknown(unknown)
        gates = GateSettings.model_validate({"granularity": granularity, "activation": activation, "reads": reads})
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
        setup = sampling_setup(
            model, clip, loras, words, latent_image, prompts, sampling_steps=sampling_steps, cfg=cfg, gates=gates
        )
        experts = len(setup.concepts)
        result, notes = training.train_gates(
            setup,
            settings,
            checkpointing=save_memory,
            images={i: latent["samples"] for i, latent in by_lora("latents", latents, experts).items()},
            captions=by_lora("captions", captions, experts),
            folder=folders.unfinished_folder(),
            progress=display.progress_bar_with_text(),
            keep=_keep,
        )
        text = _report(result, notes)
        fit = result.fit
        chart = curves({"loss": fit.losses, "entropy": fit.entropies}, f"Gate training: {objective}")
        return io.NodeOutput(result.gates, display.to_image(chart), text, ui=display.show_text(text))


def _keep(partial: TrainingResult) -> None:
    """Save the gates of a cancelled training to a file; its state, from which it can be resumed, is saved already."""
    path = folders.new_path("interrupted", folders.GATES)
    partial.gates.save(path)
    text = f"{partial.fit.stopped}: queue again to resume. The gates so far are in {path.name} (Load Gates)."
    _LOG.warning("LegoMoLE: %s", text)
    display.show_text(text)


def _report(result: TrainingResult, notes: Sequence[str]) -> str:
    """Describe a training to the user."""
    fit, labels = result.fit, [expert.label for expert in result.gates.experts]
    lines = [f"{len(result.gates.gates.names)} gates for {', '.join(labels)}"]
    if fit.losses:
        lines.append(
            f"loss {fit.losses[0]:.4g} at the first step, {fit.losses[-1]:.4g} at the last of {len(fit.losses)}"
        )
        lines.append(f"entropy of the gates {fit.entropies[0]:.3g} to {fit.entropies[-1]:.3g} nats")
    if fit.stopped:
        lines.append(f"STOPPED: {fit.stopped}")
    lines += [f"note: {note}" for note in notes]
    return "\n".join(lines)
