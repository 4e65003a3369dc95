"""Calibrate."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from comfy_api.latest import io

from ...core.train.measure import CalibrationSettings
from ..comfy import display, training
from ..sockets import CATEGORY, LEGOMOLE_STATISTICS, report_output, seed_input
from .sampling_setup import model_and_prompt_inputs, sampling_inputs, sampling_setup


class Calibrate(io.ComfyNode):
    """Measures the statistics of a model's layers that a calibrated merge needs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_Calibrate",
            display_name="Calibrate",
            category=CATEGORY,
            description="Measures the inputs of the model's layers for some prompts. With these "
            "statistics LEGO Merge and Merge LoRAs (calibrated) make a LoRA that acts like each LoRA where a prompt "
            "asks for it, and changes little elsewhere.",
            search_aliases=["calibrated merge", "regmean", "merge lora", "legomole"],
            inputs=[
                *model_and_prompt_inputs(),
                io.Int.Input(
                    "pictures",
                    default=24,
                    min=1,
                    max=10000,
                    tooltip="Number of forward passes for each LoRA alone, for LoRAs together, and for none. More is "
                    "more accurate and takes longer.",
                ),
                *sampling_inputs(),
                io.Int.Input(
                    "batch_size",
                    default=8,
                    min=1,
                    max=1024,
                    advanced=True,
                    tooltip="Images per batch. Lower it if the GPU runs out of memory.",
                ),
                seed_input("Random seed. The same seed gives the same statistics."),
            ],
            outputs=[
                LEGOMOLE_STATISTICS.Output(
                    "statistics",
                    display_name="statistics",
                    tooltip="Connect them to LEGO Merge or Merge LoRAs, together with the same LoRAs.",
                ),
                report_output("What was measured."),
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
        setup = sampling_setup(model, clip, loras, words, latent_image, prompts, sampling_steps=sampling_steps, cfg=cfg)
        settings = CalibrationSettings(samples=pictures, batch=batch_size, seed=seed)
        statistics = training.calibrate(setup, settings, display.progress_bar_with_text())
        mixture = setup.mix.mixture
        kinds = len({prompt.named for prompt in setup.prompts})
        text = (
            f"measured {len(statistics.modules)} layers with {', '.join(mixture.labels)}\n"
            f"{len(setup.prompts)} prompts of {kinds} kinds, {pictures} forward passes for each; "
            f"{statistics.size / 1e6:.1f} MB in memory"
        )
        left_out = len(mixture.targets) - len(statistics.modules)
        if left_out:
            text += f"\n{left_out} layers were not used: a merge takes the plain SVD of the sum there"
        return io.NodeOutput(statistics, text, ui=display.show_text(text))
