"""Inputs that Calibrate and Train Gates share, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ...core.mole.gates import GateSettings
from ...core.train import prompts_for
from ..comfy import folders, mixture
from ..comfy.training import SamplingSetup
from ..graph_lora import connected_loras
from ..sockets import loras_input
from ..words import words_input, words_of_loras


def model_and_prompt_inputs() -> list[Any]:
    """The base model, the LoRAs, and the prompts to sample with."""
    return [
        io.Model.Input("model", tooltip="The base model, without the LoRAs."),
        io.Clip.Input("clip", tooltip="Its text encoders."),
        loras_input(),
        words_input(),
        io.Latent.Input("latent_image", tooltip="An empty latent of the image size to work at, e.g. 512 x 512."),
        io.String.Input(
            "prompts",
            default="",
            multiline=True,
            optional=True,
            tooltip="Prompts to sample with, one per line: some with the words of one LoRA, of several, and of none. "
            "Include every kind of prompt you will use. If empty, prompts are made from the words.",
        ),
    ]


def sampling_inputs() -> list[Any]:
    """How the images are sampled."""
    return [
        io.Int.Input(
            "sampling_steps",
            default=12,
            min=1,
            max=1000,
            advanced=True,
            tooltip="Number of sampling steps per image.",
        ),
        io.Float.Input(
            "cfg",
            default=4.0,
            min=1.0,
            max=100.0,
            step=0.1,
            tooltip="Guidance scale for these images. Use the value you sample this model with: 1 for Flux and "
            "distilled models.",
        ),
    ]


def sampling_setup(
    model: Any,
    clip: Any,
    loras: Mapping[str, Any],
    words: str,
    latent_image: Mapping[str, Any],
    prompts: str | None,
    *,
    sampling_steps: int,
    cfg: float,
    gates: GateSettings | None = None,
) -> SamplingSetup:
    """Build the mixture of the connected LoRAs, and the prompts to sample with.

    Args:
        model, clip, loras, words, latent_image, prompts: Values of the inputs of `model_and_prompt_inputs`.
        sampling_steps, cfg: Values of the inputs of `sampling_inputs`.
        gates: Settings of the gates to be trained.

    Raises:
        MergeError: LoRAs of another model, too many lines of words, and see `core.train.prompts_for`.
        FormatError: A file that cannot be read.
    """
    values = connected_loras(loras, folders.lora_path)
    concepts = words_of_loras(words, values)
    parsed = prompts_for(concepts, (prompts or "").splitlines())  # report wrong words before large files are read
    mix = mixture.build_mixture(values, model, clip, settings=gates)
    return SamplingSetup(
        mix,
        model,
        mixture.apply_to_clip(mix, model, clip),
        latent_image["samples"],
        parsed,
        concepts,
        cfg,
        sampling_steps,
    )
