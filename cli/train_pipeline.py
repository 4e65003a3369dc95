"""Gate training on a diffusers pipeline, for `legomole train-gates`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..hosts.loading import default_dtype
from .console import out, print_json
from .environment import import_host, launched_devices
from .gates_input import parse_size, parse_words, read_lines, read_pictures, read_settings
from .gates_report import pipeline_code, plot_training, print_training, report_training, training_facts
from .options import PAINT_STEPS, check_free, check_output, size_of

if TYPE_CHECKING:
    from .train_gates import PipelineOptions, TrainingRun


def train_pipeline(run: TrainingRun, options: PipelineOptions) -> None:
    """Train gates on a pipeline, write them, and print how the training went.

    Raises:
        LegoMoleError: Inputs that cannot be read or trained with, or an output that cannot be written.
    """
    from ..core.train import TrainSettings

    if not options.words:
        raise typer.BadParameter("The model is a diffusers pipeline: give --words once for every LoRA.")
    concepts = parse_words(options.words, len(run.loras))
    training, gates = read_settings(
        TrainSettings, {"objective": options.objective or "distil", **run.training}, run.gates
    )
    size = None if options.size is None else parse_size(options.size)
    pictures = read_pictures(options.images, concepts)
    texts = [] if options.prompts is None else read_lines(options.prompts)
    output = check_output(run.output, "gates", [Path(path) for path, _ in run.loras], overwrite=run.overwrite)
    plot = options.plot
    if plot is not None:
        plot = plot if plot.suffix == ".png" else plot.with_name(f"{plot.name}.png")
        check_free(plot, overwrite=run.overwrite)

    import torch

    from ..core.formats import load
    from ..core.mole.gates import GateSet
    from ..core.mole.mixture import Mixture

    devices, first, device = launched_devices(run.device)
    adapters = [load(path) for path, _ in run.loras]
    trainer = import_host("diffusers.training")
    pipe = trainer.load_pipeline(run.model, device=device, dtype=getattr(torch, run.dtype or default_dtype(device)))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*belong to text encoders")  # printed below with the other left out parts
        adapters = import_host("diffusers.mixing").experts(pipe, adapters)
    mixture = Mixture(tuple(adapters), GateSet(len(adapters), gates), tuple(strength for _, strength in run.loras))
    remedy = "try --checkpointing, a smaller --batch or --size, or --set accumulation=4"
    with report_training(run.state, remedy, quiet=run.json or not first) as progress:
        result = trainer.train_gates(
            pipe, mixture, concepts, texts, training, images=pictures, size=size, guidance=options.guidance,
            sampling_steps=options.paint_steps or PAINT_STEPS, checkpointing=run.checkpointing, folder=run.state,
            devices=devices, progress=progress,
        )  # fmt: skip
    if not first:
        return
    result.gates.save(output)
    if plot is not None:
        plot_training(result, mixture.labels, plot)
    code = pipeline_code(run.model, run.loras, output, concepts)
    if run.json:
        print_json({**training_facts(result, mixture.labels), "output": str(output), "python": code})
        return
    print_training(result, mixture.labels)
    out().print(f"wrote {output} ({size_of(output)})" + (f" and {plot}" if plot else ""), markup=False)
    out().print(f"\nTo use them:\n\n{code}", markup=False)
