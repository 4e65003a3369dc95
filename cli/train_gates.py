"""`legomole train-gates`."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Annotated, Literal

import typer

from .arguments import parse_setting
from .console import out, print_json, progress_bar
from .environment import check_device, computing, host, launched
from .gates_input import parse_expert, parse_size, parse_words, read_lines, read_pictures, read_settings
from .gates_output import draw, facts, interrupted, python, tell
from .options import (
    GATES,
    GUIDANCE_HELP,
    OUTPUT,
    PAINT_STEPS_HELP,
    SIZE_HELP,
    TRAINING,
    WORDS_HELP,
    Activation,
    Balance,
    Batch,
    Checkpointing,
    Device,
    GatesOutput,
    Granularity,
    Json,
    LearningRate,
    ModelDtype,
    Overwrite,
    State,
    Steps,
    TrainingSeed,
    check_free,
    check_output,
    size_of,
)

EXAMPLES = """[bold]Examples[/bold]

Gates for a style and a subject, without a single picture:
[cyan]legomole train-gates sd15 style.safetensors:0.8 heart.safetensors --words 'ember style,burning' --words heart \\
  --device cuda -o gates.safetensors[/cyan]

The router as gates, which only reads the prompts:
[cyan]legomole train-gates sd15 a.safetensors b.safetensors --words ember --words heart --objective router \\
  -o gates.safetensors[/cyan]

From your own pictures, so that an interruption loses nothing:
[cyan]legomole train-gates sd15 a.safetensors b.safetensors --words ember --words heart --objective denoise \\
  --images 1:embers --images 2:hearts --state run1 -o gates.safetensors[/cyan]
"""
PICTURES = "Pictures the models paint to learn from"


def train_gates(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            help="A folder in diffusers' format, or the name of a model in the local cache. Nothing is downloaded.",
        ),
    ],
    loras: Annotated[
        list[str],
        typer.Argument(metavar="LORA[:STRENGTH]", help="LoRA files or PEFT folders. Strength 1 if not given."),
    ],
    words: Annotated[list[str], typer.Option(metavar="WORDS", help=WORDS_HELP)],
    output: GatesOutput,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Prompts to train on, one a line. Kinds that are missing (each LoRA alone, several, none) are made up "
            "from the words; without a file all are.",
        ),
    ] = None,
    objective: Annotated[
        Literal["distil", "router", "denoise", "clip"],
        typer.Option(
            metavar="NAME",
            rich_help_panel=TRAINING,
            help="distil: imitate the LoRAs a prompt names, needs no pictures. router: only read the prompts. denoise: "
            "the pictures of --images. clip: please the CLIP model of --clip.",
        ),
    ] = "distil",
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N:FOLDER",
            rich_help_panel=TRAINING,
            help="denoise: pictures of the N-th LoRA's concept. A .txt of the same name describes one; without it the "
            "LoRA's first words do. Repeatable.",
        ),
    ] = None,
    clip: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            rich_help_panel=TRAINING,
            help="clip: a CLIP model with its processor, as transformers saves it.",
        ),
    ] = None,
    steps: Steps = None,
    batch: Batch = None,
    lr: LearningRate = None,
    balance: Balance = None,
    seed: TrainingSeed = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            rich_help_panel=TRAINING,
            help="Any other setting: examples (640), samples (128), accumulation (1), warmup (10), patience (0), "
            "compose (1.2), weight_decay (0.001). Repeatable.",
        ),
    ] = None,
    checkpointing: Checkpointing = False,
    state: State = None,
    granularity: Granularity = "layer",
    activation: Activation = "sigmoid",
    reads: Annotated[
        Literal["text", "hidden", "experts", "flat"],
        typer.Option(
            metavar="NAME",
            rich_help_panel=GATES,
            help="What gates see: the prompt (text), the block's input (hidden), the LoRAs' outputs (experts, or flat "
            "as in the paper).",
        ),
    ] = "text",
    size: Annotated[str | None, typer.Option(metavar="WxH", rich_help_panel=PICTURES, help=SIZE_HELP)] = None,
    guidance: Annotated[
        float | None, typer.Option(metavar="SCALE", rich_help_panel=PICTURES, help=GUIDANCE_HELP)
    ] = None,
    paint_steps: Annotated[int, typer.Option(metavar="N", min=1, rich_help_panel=PICTURES, help=PAINT_STEPS_HELP)] = 12,
    device: Device = "cpu",
    dtype: ModelDtype = None,
    plot: Annotated[
        Path | None,
        typer.Option(metavar="FILE", rich_help_panel=OUTPUT, help="Also draw the training and the gates (.png)."),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train the gates that mix LoRAs at run time (MoLE), for a diffusers pipeline.

    The LoRAs stay apart; small gates decide for every prompt and layer how much of each goes in. Only they are trained.
    [bold]accelerate launch -m legomole train-gates ..[/bold] shares the work among several devices.
    """
    from ..core.train import TrainSettings

    entries = [parse_expert(text) for text in loras]
    concepts = parse_words(words, len(entries))
    given = {"steps": steps, "batch": batch, "learning_rate": lr, "balance": balance, "seed": seed}
    typed = {"objective": objective, **{k: v for k, v in given.items() if v is not None}}
    training, chosen = read_settings(
        TrainSettings,
        {**typed, **dict(map(parse_setting, settings or ()))},
        {"granularity": granularity, "activation": activation, "reads": reads},
    )
    if objective == "clip" and clip is None:
        raise typer.BadParameter("The objective clip needs --clip FOLDER.")
    pixels = None if size is None else parse_size(size)
    pictures = read_pictures(images or (), concepts)
    texts = [] if prompts is None else read_lines(prompts)
    output = check_output(output, "gates", [Path(path) for path, _ in entries], overwrite=overwrite)
    if plot is not None:
        plot = plot if plot.suffix == ".png" else plot.with_name(f"{plot.name}.png")
        check_free(plot, overwrite=overwrite)
    check_device(device)

    import torch

    from ..core.formats import load
    from ..core.memory import report_out_of_memory
    from ..core.mole.gates import GateSet
    from ..core.mole.mixture import Mixture

    devices, first, device = launched(device)
    number = getattr(torch, dtype or computing(device))
    adapters = [load(path) for path, _ in entries]
    pipe = host("diffusers.training").load_pipeline(pipeline, device=device, dtype=number)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*belong to text encoders")  # told below, with the rest that is left out
        adapters = host("diffusers.mixing").experts(pipe, adapters)
    mixture = Mixture(tuple(adapters), GateSet(len(adapters), chosen), tuple(strength for _, strength in entries))
    critic = None if clip is None else host("diffusers.clip").load_clip(clip)
    with (
        progress_bar("training", quiet=json or not first, telling=True) as progress,
        report_out_of_memory("try --checkpointing, a smaller --batch or --size, or --set accumulation=4"),
    ):
        try:
            done = host("diffusers.training").train_gates(
                pipe, mixture, concepts, texts, training, images=pictures, clip=critic, size=pixels, guidance=guidance,
                sampling_steps=paint_steps, checkpointing=checkpointing, folder=state, devices=devices,
                progress=progress,
            )  # fmt: skip
        except KeyboardInterrupt:
            raise KeyboardInterrupt(interrupted(state)) from None
    if not first:
        return
    done.gates.save(output)
    if plot is not None:
        draw(done, mixture.labels, plot)
    code = python(pipeline, entries, output, concepts)
    if json:
        print_json({**facts(done, mixture.labels), "output": str(output), "python": code})
        return
    tell(done, mixture.labels)
    out().print(f"wrote {output} ({size_of(output)})" + (f" and {plot}" if plot else ""), markup=False)
    out().print(f"\nTo use them:\n\n{code}", markup=False)
