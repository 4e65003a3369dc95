"""Options that several commands share, and the check of the output they all make. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from ..core.errors import SaveError

# named here, not taken from the engine's tables, so that --help needs no torch
MethodName = Literal["lego", "concat", "linear", "svd", "ties", "dare", "knots", "calibrated"]
FormatName = Literal["kohya", "diffusers", "peft", "comfy"]
DtypeName = Literal["float32", "float16", "bfloat16"]

DEFAULT_RANK = "1x"  # the inputs' mean rank, the choice of the LEGO paper

METHOD, LEGO, WEIGHTS, OUTPUT = "Method", "Settings of LEGO", "Weights", "Output"
GATES, TRAINING = "Gates", "Training"
WORDS_HELP = (
    "What prompts call the concept of a LoRA: words or phrases, with commas between. Once for every LoRA, "
    "in their order."
)
CALIBRATION = "Calibration: measure on the model's own pictures first"

SIZE_HELP = "Pixels: 512, or 768x512. Default the pipeline's; smaller is faster."
GUIDANCE_HELP = "Default the pipeline's. 1: none."
PAINT_STEPS_HELP = "Steps per picture."

Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", rich_help_panel=OUTPUT, help="File to write (.safetensors), or a folder for --format peft."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the output if it exists; else that is an error."),
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output, errors too.")]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="TYPE",
        rich_help_panel=OUTPUT,
        help="Numbers of the result: float32, float16 or bfloat16. Default: the inputs' widest.",
    ),
]
Format = Annotated[
    FormatName | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=OUTPUT,
        help="kohya, diffusers, peft or comfy. Default: that of the first LoRA, if it has names for all layers.",
    ),
]
ConvertRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Allow LoHa, LoKr and full deltas: approximate each at this rank. Default: refuse them.",
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Where to compute: cpu, cuda, cuda:1, mps.")]
Seed = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=METHOD, help="Of lego's extra starts and dare's masks. Default 0."),
]
RankOption = Annotated[
    str | None,
    typer.Option(
        metavar="RANK",
        rich_help_panel=METHOD,
        help="Merged rank: a number (16), a multiple of the inputs' mean rank (1.5x), as much as keeps a share of the "
        f"sum's energy (95%), or auto (= 95%). Default {DEFAULT_RANK}.",
    ),
]
# of gates
GatesOutput = Annotated[
    Path, typer.Option("-o", "--output", rich_help_panel=OUTPUT, help="File to write (.safetensors).")
]
Steps = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Of the optimizer. Default 200.")
]
Batch = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Examples per step. Default 32, of texts 8.")
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", metavar="RATE", rich_help_panel=TRAINING, help="Learning rate. Default 0.01."),
]
Balance = Annotated[
    float | None,
    typer.Option(
        metavar="WEIGHT", rich_help_panel=TRAINING, help="Of the balance loss. Default 0; the MoLE paper has 0.5."
    ),
]
TrainingSeed = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Of everything drawn. Default 0.")
]
Checkpointing = Annotated[
    bool, typer.Option("--checkpointing", rich_help_panel=TRAINING, help="Save memory: compute every block twice.")
]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        rich_help_panel=TRAINING,
        help="Keep what was done here; the same command goes on after an interruption.",
    ),
]
Granularity = Annotated[
    Literal["network", "block", "layer", "matrix"],
    typer.Option(metavar="NAME", rich_help_panel=GATES, help="One gate per network, block, layer or matrix."),
]
Activation = Annotated[
    Literal["sigmoid", "softmax", "softmax-null"],
    typer.Option(
        metavar="NAME",
        rich_help_panel=GATES,
        help="sigmoid: every LoRA for itself. softmax: shares of 1 (the paper's). softmax-null: one for none.",
    ),
]
ModelDtype = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="TYPE",
        help="Of the model: float32, bfloat16 or float16 (which loses small gradients). Default float32 on the "
        "CPU, bfloat16 elsewhere.",
    ),
]


def check_output(output: Path, format: str, inputs: list[Path], *, overwrite: bool) -> Path:
    """The path that will be written, refused before any work is done if it cannot be.

    Raises:
        SaveError: It exists and may not be replaced, is one of the inputs, or its folder is missing.
    """
    if format != "peft":
        if output.is_dir():
            raise SaveError("The output is a folder.", file=output, expected="a file name, or --format peft")
        if output.suffix != ".safetensors":
            output = output.with_name(f"{output.name}.safetensors")
    if output.exists() and any(path.exists() and path.samefile(output) for path in inputs):
        raise SaveError("The output is one of the inputs.", file=output, remedy="choose another name")
    check_free(output, overwrite=overwrite)
    return output


def check_free(output: Path, *, overwrite: bool) -> None:
    """Refuse an output that exists and may not be replaced, or whose folder is missing.

    Raises:
        SaveError: See above.
    """
    if not output.absolute().parent.is_dir():
        raise SaveError("The output folder does not exist.", file=output.absolute().parent, remedy="create it first")
    if output.exists() and not overwrite:
        raise SaveError("The output exists already.", file=output, remedy="choose another name, or add --overwrite")


def size_of(path: Path) -> str:
    """Size of a file, or of all files in a folder, for people."""
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
