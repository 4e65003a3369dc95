"""Calibrate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ...core.merge.methods import METHODS
from ...core.train import prompts_for
from ...core.train.measure import CalibrationSettings
from ..comfy import mixes, program, training
from ..lora import flatten
from ..sockets import CATEGORY, LEGOMOLE_STATISTICS, loras_input, painting_inputs, seed_input, words_input
from .train_gates import concepts_of


class Calibrate(io.ComfyNode):
    """Measure what the model's layers see, by which LoRAs a prompt names: what a calibrated merge needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_Calibrate",
            display_name="Calibrate",
            category=CATEGORY,
            description="Runs some prompts through the model and notes what its layers see. With that, LEGO Merge and "
            "Merge LoRAs (calibrated) make a LoRA that acts like each where it is asked for and leaves the rest alone.",
            search_aliases=["calibrated merge", "regmean", "merge lora", "legomole"],
            inputs=[
                io.Model.Input("model", tooltip="The base model, without the LoRAs."),
                io.Clip.Input("clip", tooltip="Its text encoders."),
                loras_input(),
                words_input(),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size to measure at, e.g. 512 x 512."),
                io.String.Input(
                    "prompts",
                    default="",
                    multiline=True,
                    optional=True,
                    tooltip="Prompts to measure on, one a line: with one LoRA's words, with several, with none; the "
                    "more unlike, the better. Left empty, they are made from the words.",
                ),
                io.Int.Input(
                    "pictures",
                    default=24,
                    min=1,
                    max=10000,
                    tooltip="How many pictures the model paints with each LoRA alone, with each group, and with none.",
                ),
                *painting_inputs(),
                io.Int.Input("batch_size", default=8, min=1, max=1024, advanced=True, tooltip="Pictures at a time."),
                seed_input("Of everything drawn. The same seed gives the same statistics."),
            ],
            outputs=[
                LEGOMOLE_STATISTICS.Output(
                    "statistics", display_name="statistics", tooltip="For LEGO Merge and Merge LoRAs, same LoRAs."
                ),
                io.String.Output("report", display_name="report", tooltip="What was measured."),
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
        pictures: int,
        sampling_steps: int,
        cfg: float,
        batch_size: int,
        seed: int,
        prompts: str | None = None,
    ) -> io.NodeOutput:
        values = flatten(loras, program.lora_path)
        asked = prompts_for(concepts_of(words, values), (prompts or "").splitlines())
        mix = mixes.build(values, model, clip)
        found = training.calibrate(
            mix,
            model,
            mixes.on_clip(mix, model, clip, METHODS["concat"]()),
            latent_image["samples"],
            asked,
            CalibrationSettings(samples=pictures, batch=batch_size, seed=seed),
            cfg=cfg,
            sampling_steps=sampling_steps,
            progress=program.told_progress(),
        )
        kinds = len({prompt.named for prompt in asked})
        text = (
            f"measured {len(found.modules)} layers with {', '.join(mix.mixture.labels)}\n"
            f"{len(asked)} prompts of {kinds} kinds, {pictures} pictures of each; {found.size / 1e6:.1f} MB in memory"
        )
        left_out = len(mix.mixture.targets) - len(found.modules)
        if left_out:
            text += f"\n{left_out} layers are too wide to be measured, or not used: they get the plain SVD of the sum"
        return io.NodeOutput(found, text, ui=program.show(text))
