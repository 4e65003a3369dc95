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
    Axis,
    cells_by_setup,
    describe_cells,
    grid_of_cells,
)
from ...core.pictures.sheet import comparison_sheet
from ..comfy import program
from ..comfy.sampling import SAMPLERS, SCHEDULERS
from ..lora import flatten
from ..settings import RANK_HELP
from ..sockets import CATEGORY, LEGOMOLE_GATES, LEGOMOLE_STATISTICS, loras_input
from .cells import Bench, paint

_VALUES = (
    "Separated by commas: none, concat, svd, lego, mole (method); 8, 1x, 95% (rank); 0, 0.5, 1 (strength); 1, 2, 3 "
    "(seed). Prompts one per line."
)


def _axis(side: str, kind: str, values: str, where: str) -> list[Any]:
    return [
        io.Combo.Input(
            f"{side}_axis",
            options=list(AXIS_KINDS),
            default=kind,
            tooltip=f"What changes from {where}. strength is a factor on all LoRAs' own strengths, strength 2 on the "
            "second LoRA's alone.",
        ),
        io.String.Input(f"{side}_values", default=values, multiline=True, tooltip=_VALUES),
    ]


class XYCompare(io.ComfyNode):
    """One picture per method, rank, strength, seed or prompt, side by side."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="LegoMoLE_XYCompare",
            display_name="XY Compare",
            category=CATEGORY,
            description="Paints the same picture with several methods, ranks, strengths, seeds or prompts, and puts "
            "them on one labelled sheet.",
            search_aliases=["xy plot", "grid", "compare loras", "compare methods", "lora strength plot", "legomole"],
            is_output_node=True,  # it shows its picture itself
            inputs=[
                io.Model.Input("model", tooltip="The diffusion model, without the LoRAs."),
                io.Clip.Input("clip", tooltip="Its text encoders, without the LoRAs."),
                io.Vae.Input("vae", tooltip="Decodes the pictures."),
                loras_input(),
                io.Latent.Input("latent_image", tooltip="An empty latent of the size to paint."),
                io.String.Input(
                    "prompt",
                    default="",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What to paint, where no axis says it.",
                ),
                io.String.Input("negative", default="", multiline=True, tooltip="What not to paint."),
                *_axis("x", "method", "none, concat, svd, lego, mole", "column to column"),
                *_axis("y", NOTHING, "", "row to row"),
                io.Combo.Input(
                    "method",
                    options=list(METHOD_CHOICES),
                    default="lego",
                    tooltip="Where no axis says it. none: the plain model. mole: as MoLE Mix. calibrated and lego "
                    "calibrated need statistics. The others: as LEGO Merge and Merge LoRAs do it.",
                ),
                io.String.Input("rank", default="1x", tooltip=f"Where no axis says it. {RANK_HELP}"),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=2**64 - 1,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="Of the noise, where no axis says it.",
                ),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Sampling steps of every picture."),
                io.Float.Input("cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Guidance."),
                io.Combo.Input("sampler_name", options=SAMPLERS, tooltip="As in KSampler."),
                io.Combo.Input("scheduler", options=SCHEDULERS, tooltip="As in KSampler."),
                io.Float.Input(
                    "latent_scale",
                    default=1.0,
                    min=0.01,
                    max=8.0,
                    step=0.01,
                    advanced=True,
                    tooltip="Resizes the latent before it is decoded. 1 for all models but LegoMoLE's own small one, "
                    "which works on latents twice as large as its pictures: 0.5.",
                ),
                LEGOMOLE_GATES.Input("gates", optional=True, tooltip="For mole. Without any, all LoRAs go in evenly."),
                LEGOMOLE_STATISTICS.Input(
                    "statistics", optional=True, tooltip="From Calibrate: for calibrated and lego calibrated."
                ),
            ],
            outputs=[
                io.Image.Output("grid", display_name="grid", tooltip="All pictures on one sheet, with labels."),
                io.Image.Output("IMAGE", tooltip="The pictures alone, row by row."),
                io.String.Output("report", display_name="report", tooltip="What each cell is, and how long it took."),
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
    ) -> io.NodeOutput:
        values = flatten(loras, program.lora_path) if any(lora is not None for lora in loras.values()) else []
        x, y = Axis.parse("x", x_axis, x_values), Axis.parse("y", y_axis, y_values)
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
        found = cells_by_setup(grid)
        progress = program.told_progress()
        bench = Bench(model, clip, negative, values, gates=gates, statistics=statistics, progress=progress)
        ready = bench.ready(found)
        remarks = {setup: made.remark for setup, made in ready.items()}
        warnings = dict.fromkeys(line for made in ready.values() for line in made.warnings)
        pictures, seconds = paint(
            found,
            ready,
            vae,
            latent_image,
            steps=steps,
            cfg=cfg,
            sampler=sampler_name,
            scheduler=scheduler,
            latent_scale=latent_scale,
            progress=progress,
        )
        labels = [lora.label for lora in values]
        drawn = comparison_sheet(  # of several pictures in a cell, one beside the other
            [[torch.cat([*pictures[cell]], 1) for cell in row] for row in grid],
            x.values,
            y.values,
            x.title(labels),
            y.title(labels),
        )
        text = "\n".join([describe_cells(grid, seconds, remarks), *(f"  note: {line}" for line in warnings)])
        image = program.picture(drawn)
        program.show(text)
        batch = torch.cat([pictures[cell] for row in grid for cell in row])
        return io.NodeOutput(image, batch, text, ui=ui.PreviewImage(image, cls=cls))
