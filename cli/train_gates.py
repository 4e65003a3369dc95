"""`legomole train-gates`, for diffusers pipelines and for language models of transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .arguments import parse_settings
from .environment import check_device, import_host
from .gates_input import parse_expert
from .options import (
    GATES,
    OUTPUT,
    TRAINING,
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
    sampling_option,
)

EXAMPLES = """[bold]Examples[/bold]

Gates for a style and a subject, without any pictures:
[cyan]legomole train-gates sd15 style.safetensors:0.8 heart.safetensors --words 'ember style,burning' --words heart \\
  --device cuda -o gates.safetensors[/cyan]

The prompt router as gates, which takes seconds:
[cyan]legomole train-gates sd15 a.safetensors b.safetensors --words ember --words heart --objective router \\
  -o gates.safetensors[/cyan]

From your own pictures, with checkpoints:
[cyan]legomole train-gates sd15 a.safetensors b.safetensors --words ember --words heart --objective denoise \\
  --images 1:embers --images 2:hearts --state run1 -o gates.safetensors[/cyan]

Two adapters of a language model, from a few examples of what each is for:
[cyan]legomole train-gates ./llama sums/ poems/:0.8 --texts sums.jsonl --texts poems.jsonl -o gates.safetensors[/cyan]

A gate for every token, on two devices:
[cyan]accelerate launch --num_processes 2 -m legomole train-gates ./llama sums/ poems/ --reads token \\
  --texts sums.jsonl --texts poems.jsonl -o gates.safetensors[/cyan]
"""
PICTURES = "Diffusers pipelines: pictures generated for training"
TEXTS = "Language models"


@dataclass(frozen=True)
class TrainingRun:
    """What both kinds of training need.

    Args:
        model: Folder or name of the model.
        loras: Path and strength of each LoRA.
        output: File to write.
        training: Fields of the training settings that are given.
        gates: Fields of `GateSettings` that are given.
        checkpointing, state, device, dtype, overwrite, json: Options as typed.
    """

    model: str
    loras: Sequence[tuple[str, float]]
    output: Path
    training: dict[str, Any]
    gates: dict[str, Any]
    checkpointing: bool
    state: Path | None
    device: str
    dtype: str | None
    overwrite: bool
    json: bool


@dataclass(frozen=True)
class PipelineOptions:
    """Options for diffusers pipelines, as typed."""

    words: Sequence[str] = field(default_factory=list)
    prompts: Path | None = None
    objective: str | None = None
    images: Sequence[str] = field(default_factory=list)
    size: str | None = None
    guidance: float | None = None
    paint_steps: int | None = None
    plot: Path | None = None


@dataclass(frozen=True)
class LanguageOptions:
    """Options for language models, as typed."""

    texts: Sequence[Path] = field(default_factory=list)
    others: Path | None = None


def train_gates(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A diffusers pipeline or a language model with its tokenizer: a folder, or the name of a model in the "
            "local cache (OWNER/NAME or OWNER/NAME@REVISION). Nothing is downloaded.",
        ),
    ],
    loras: Annotated[
        list[str],
        typer.Argument(metavar="LORA[:STRENGTH]", help="LoRA files or PEFT folders. Default strength 1."),
    ],
    output: GatesOutput,
    words: Annotated[list[str] | None, sampling_option("words", PICTURES)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=PICTURES,
            help="Prompts to train on, one per line. Missing kinds (each LoRA alone, several, none) are generated from "
            "the words; without a file all are.",
        ),
    ] = None,
    objective: Annotated[
        Literal["distil", "router", "denoise"] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=PICTURES,
            help="distil (default): imitate the LoRAs that a prompt names; needs no pictures. router: fit the prompts "
            "only. denoise: the pictures of --images.",
        ),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            metavar="N:FOLDER",
            rich_help_panel=PICTURES,
            help="denoise: pictures of the N-th LoRA's concept. A .txt file of the same name holds the caption; "
            "default the LoRA's first words. Repeatable.",
        ),
    ] = None,
    size: Annotated[str | None, sampling_option("size", PICTURES)] = None,
    guidance: Annotated[float | None, sampling_option("guidance", PICTURES)] = None,
    paint_steps: Annotated[int | None, sampling_option("paint_steps", PICTURES)] = None,
    texts: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=TEXTS,
            help="Examples of what a LoRA is for, once per LoRA, in order. One JSON object per line: "
            '{"prompt": "..", "completion": ".."}, or {"text": ".."} for gates that read tokens.',
        ),
    ] = None,
    others: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=TEXTS,
            help="Examples that belong to no LoRA: there the predictions of the base model are kept.",
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
            help="Other settings: accumulation (1), warmup (10), patience (0), weight_decay (0.001); for pipelines "
            "also examples (160), samples (128, for denoise), compose (1.2). Repeatable.",
        ),
    ] = None,
    checkpointing: Checkpointing = False,
    state: State = None,
    granularity: Granularity = None,
    activation: Activation = None,
    reads: Annotated[
        Literal["text", "text-mean", "hidden", "experts", "token"] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=GATES,
            help="What gates read. Pipelines: text (which LoRAs the prompt names, default), hidden (the block's "
            "input), experts (the LoRAs' outputs), or text-mean (the mean of the text, which closes gates when a "
            "prompt gets longer; only to reproduce gates of earlier versions). Language models: hidden (the prompt, "
            "through the layer's input, default), experts, or "
            "token (every token by itself).",
        ),
    ] = None,
    device: Device = "cpu",
    dtype: ModelDtype = None,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", rich_help_panel=OUTPUT, help="Pipelines: also plot the training and the gates (.png)."
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Train the gates that mix LoRAs at run time (MoLE), for a diffusers pipeline or a language model.

    The LoRAs stay apart; small gates decide for every prompt and layer how much of each goes in. Only they are trained.
    [bold]accelerate launch -m legomole train-gates ..[/bold] distributes the work over several devices.
    """
    options = {"steps": steps, "batch": batch, "learning_rate": lr, "balance": balance, "seed": seed}
    flags = {name: f"--{name}" for name in (*options, "objective")} | {"learning_rate": "--lr"}
    gates = {"granularity": granularity, "activation": activation, "reads": reads}
    run = TrainingRun(
        model,
        [parse_expert(text) for text in loras],
        output,
        {**_given(options), **parse_settings(settings or (), flags)},
        _given(gates),
        checkpointing,
        state,
        device,
        dtype,
        overwrite,
        json,
    )
    pictures = PipelineOptions(words or [], prompts, objective, images or [], size, guidance, paint_steps, plot)
    language = LanguageOptions(texts or [], others)
    check_device(device)
    if import_host("api").kind_of_folder(model) == "pipeline":
        _refuse(language, LanguageOptions(), "a diffusers pipeline")
        from .train_pipeline import train_pipeline

        train_pipeline(run, pictures)
    else:
        _refuse(pictures, PipelineOptions(), "a language model")
        from .train_language_model import train_language_model

        train_language_model(run, language)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _refuse(options: object, defaults: object, kind: str) -> None:
    """Raise unless no option of the other kind of model is given."""
    given = [name for name, value in vars(options).items() if value != vars(defaults)[name]]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise typer.BadParameter(f"The model is {kind}, for which there is no {names}.")
