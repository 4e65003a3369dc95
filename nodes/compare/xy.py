"""XY Compare."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from comfy_api.latest import io, ui

from ...core.merge.statistics import Statistics
from ...core.mole.trained import TrainedGates
from ...core.pictures.comparison import (
    AXIS_KINDS,
    METHOD_CHOICES,
    NOTHING,
    SWEEP,
    Axis,
    cells_by_setup,
    describe_cells,
    grid_of_cells,
)
from ...core.pictures.sheet import comparison_sheet
from ..comfy import display, folders
from ..comfy.sampling import SAMPLERS, SCHEDULERS
from ..graph_lora import connected_loras
from ..settings import RANK_HELP
from ..sockets import (
    CATEGORY,
    LEGOMOLE_GATES,
    LEGOMOLE_STATISTICS,
    loras_input,
    refuse_unknown,
    report_output,
    seed_input,
)
from ..words import words_input
from .cells import ModelPreparer, SamplerSettings, sample_cells
from .swept import sweep_loras

_VALUES_HELP = (
    "Separated by commas, e.g. none, concat, svd, lego, mole (method); 8, 1x, 95% (rank); 0, 0.5, 1 (strength, "
    "equalize); 0, 8 (cap); 1, 2, 3 (seed). Prompts: one per line. Not used for sweep."
)


def _axis_inputs(side: str, kind: str, values: str, direction: str) -> list[Any]:
    return [
        io.Combo.Input(
            f"{side}_axis",
            options=list(AXIS_KINDS),
            default=kind,
            tooltip=f"What changes from {direction}. strength is a factor on the strengths of all LoRAs, strength 2 on "
            "that of the second alone. sweep: the best six of 14 methods, ranks and strengths, as predicted from what "
            "is measured on the model.",
        ),
        io.String.Input(f"{side}_values", default=values, multiline=True, tooltip=_VALUES_HELP),
    ]


class XYCompare(io.ComfyNode):
    """Samples one prompt with several methods, ranks, strengths, seeds or prompts, side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_XYCompare",
            display_name="XY Compare",
            category=CATEGORY,
            description="Samples images with several methods, ranks, strengths, seeds or prompts, and puts them on one "
            "labelled sheet.",
            search_aliases=["xy plot", "grid", "compare loras", "compare methods", "lora strength plot", "legomole"],
            is_output_node=True,  # it shows its own image
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, without the LoRAs."),
                io.Clip.Input("clip", tooltip="Its text encoders, without the LoRAs."),
                io.Vae.Input("vae", tooltip="Decodes the images."),
                loras_input(),
                io.Latent.Input("latent_image", tooltip="An empty latent of the image size."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="The prompt, unless an axis changes it.",
                ),
                io.String.Input("negative", default="", multiline=True, tooltip="The negative prompt."),
                *_axis_inputs("x", "method", "none, concat, svd, lego, mole", "column to column"),
                *_axis_inputs("y", NOTHING, "", "row to row"),
                io.Combo.Input(
                    "method",
                    options=list(METHOD_CHOICES),
                    default="lego",
                    tooltip="How the LoRAs are used, unless an axis changes it. none: the model without them. mole: "
                    "as in MoLE Mix. calibrated and lego calibrated: with statistics from Calibrate. The others: as in "
                    "LEGO Merge and Merge LoRAs.",
                ),
                io.String.Input("rank", default="1x", tooltip=f"Unless an axis changes it. {RANK_HELP}"),
                seed_input("Random seed, unless an axis changes it.", 2**64 - 1),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Number of sampling steps per image."),
                io.Float.Input(
                    "cfg",
                    default=8.0,
                    min=0.0,
                    max=100.0,
                    step=0.1,
                    round=0.01,
                    tooltip="Guidance scale, as in KSampler.",
                ),
                io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="Sampler, as in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="Scheduler, as in KSampler."),
                io.Float.Input(
                    "latent_scale",
                    default=1.0,
                    min=0.01,
                    max=8.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Factor to resize the latent by before decoding. Leave it at 1, except for LegoMoLE's demo "
                    "model, whose latents are twice as large as its images: 0.5.",
                ),
                LEGOMOLE_GATES.Input(
                    "gates",
                    optional=True,
                    tooltip="Trained gates for mole. Without gates every LoRA is used at its own strength.",
                ),
                LEGOMOLE_STATISTICS.Input(
                    "statistics",
                    optional=True,
                    tooltip="From Calibrate, for calibrated and lego calibrated. A sweep measures the model itself if "
                    "nothing is connected.",
                ),
                words_input("For a sweep without statistics.", optional=True),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="All images on one sheet, with labels."),
                io.Image.Output("IMAGE", tooltip="The images as a batch, row by row."),
                report_output("The setup of each cell, and how long it took."),
            ],
        )

    @classmethod
    def execute(
        cls,
        model: Any,
        clip: Any,
        vae: Any,
        loras: dict[str, Any],
        latent_image: Mapping[str, Any],
        prompt: str,
        negative: str,
        x_axis: str,
        x_values: str,
        y_axis: str,
        y_values: str,
        method: str,
        rank: str,
        seed: int,
        steps: int,
        cfg: float,
        sampler_name: str,
        scheduler: str,
        latent_scale: float,
        gates: TrainedGates | None = None,
        statistics: Statistics | None = None,
        words: str | None = None,
        **unknown: Any,
    ) -> io.NodeOutput:
        refuse_unknown(unknown)
        values = connected_loras(loras, folders.lora_path, may_be_none=True)
        x, y = Axis.parse("x", x_axis, x_values), Axis.parse("y", y_axis, y_values)
        progress = display.progress_bar_with_text()
        sweep_lines: list[str] = []
        if SWEEP in (x.kind, y.kind):
            swept, statistics, page = sweep_loras(
                values, model, clip, statistics, words=words or "", rank=rank, progress=progress
            )
            x, y = (Axis.of_sweep(swept) if axis.kind == SWEEP else axis for axis in (x, y))
            sweep_lines = [swept.text(), f"Page with the sweep: {page}"]
        grid = grid_of_cells(
            x,
            y,
            method=method,
            rank=rank,
            seed=seed,
            prompt=prompt,
            loras=len(values),
            statistics=statistics is not None,
        )
        cells = cells_by_setup(grid)
        preparer = ModelPreparer(model, clip, negative, values, gates=gates, statistics=statistics, progress=progress)
        models = preparer.prepare(cells)
        remarks = {setup: prepared.remark for setup, prepared in models.items()}
        warnings = dict.fromkeys(line for prepared in models.values() for line in prepared.warnings)
        settings = SamplerSettings(steps, cfg, sampler_name, scheduler, latent_scale)
        images, seconds = sample_cells(cells, models, vae, latent_image, settings, progress)
        labels = [lora.label for lora in values]
        drawn = comparison_sheet(
            [[torch.cat([*images[cell]], 1) for cell in row] for row in grid],  # a cell's batch, side by side
            x.values,
            y.values,
            x.title(labels),
            y.title(labels),
        )
        notes = [f"  note: {line}" for line in warnings]
        text = "\n".join([describe_cells(grid, seconds, remarks), *notes, *sweep_lines])
        image = display.to_image(drawn)
        display.show_text(text)
        batch = torch.cat([images[cell] for row in grid for cell in row])
        return io.NodeOutput(image, batch, text, ui=ui.PreviewImage(image, cls=cls))
