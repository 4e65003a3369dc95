"""Options that several commands share, and checks of output paths. Loads no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..core.errors import SaveError
from ..core.recipes.dtype_names import full_dtype_name

# repeated here rather than imported from the engine, so that --help does not load torch
MethodName = Literal["lego", "concat", "linear", "svd", "ties", "dare", "knots", "calibrated", "ssr", "np"]
FormatName = Literal["kohya", "diffusers", "peft", "comfy"]
DtypeName = Literal["float32", "float16", "bfloat16", "fp32", "fp16", "bf16"]

METHOD, LEGO, WEIGHTS, OUTPUT = "Method", "Settings of LEGO", "Weights", "Output"
GATES, TRAINING = "Gates", "Training"
BASE = "Base model: merge so that it stays as it is where no LoRA is asked for"
PAINT_STEPS = 12  # default of --paint-steps


_SAMPLING_OPTIONS: dict[str, dict[str, Any]] = {
    "words": {
        "metavar": "WORDS",
        "help": "Words or phrases by which prompts name the concept of a LoRA, separated by commas. Once per LoRA, in "
        "order.",
    },
    "size": {
        "metavar": "WxH",
        "help": "Picture size in pixels: 512, or 768x512 for width and height. Default: the pipeline's; smaller is "
        "faster.",
    },
    "guidance": {"metavar": "SCALE", "help": "Guidance scale. Default: the pipeline's. 1: no guidance."},
    "paint_steps": {"metavar": "N", "min": 1, "help": f"Sampling steps per picture. Default {PAINT_STEPS}."},
}


def sampling_option(name: Literal["words", "size", "guidance", "paint_steps"], panel: str) -> Any:
    """An option for the pictures that a pipeline samples, in a panel of the command's help."""
    return typer.Option(rich_help_panel=panel, **_SAMPLING_OPTIONS[name])


Output = Annotated[
    Path,
    typer.Option(
        "-o", "--output", rich_help_panel=OUTPUT, help="File to write (.safetensors), or a folder for --format peft."
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", rich_help_panel=OUTPUT, help="Replace the output if it exists. Default: refuse."),
]
Json = Annotated[bool, typer.Option("--json", help="Print only JSON on standard output, including errors.")]
Dtype = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="TYPE",
        rich_help_panel=OUTPUT,
        callback=lambda name: name and full_dtype_name(name),
        help="Dtype of the result: float32, float16 or bfloat16 (or fp32, fp16, bf16). Default: the widest of the "
        "inputs.",
    ),
]
Format = Annotated[
    FormatName | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=OUTPUT,
        help="File format: kohya, diffusers, peft or comfy. Default: that of the first LoRA if it can name all layers.",
    ),
]
ReaderName = Literal["comfy", "diffusers", "kohya", "peft"]
For = Annotated[
    ReaderName | None,
    typer.Option(
        "--for",
        metavar="PROGRAM",
        rich_help_panel=OUTPUT,
        help="Program that shall read the file, and decides how layers are named: comfy, diffusers, kohya or peft. "
        "Default: that of --format; else the LoRAs' own names where they agree, and ComfyUI's where they do not.",
    ),
]
ConvertRank = Annotated[
    int | None,
    typer.Option(
        min=1,
        metavar="K",
        help="Approximate LoHa, LoKr and full differences at this rank. Default: refuse LoHa and LoKr, sum full "
        "differences exactly.",
    ),
]
Base = Annotated[
    str | None,
    typer.Option(
        metavar="FILE_OR_FOLDER",
        help="Base model of LoRAs that are DoRA: a safetensors checkpoint, a diffusers or transformers folder, or a "
        "name in the local Hugging Face cache. Needs --convert-rank. Default: refuse DoRA.",
    ),
]
Cap = Annotated[
    float | None,
    typer.Option(
        metavar="TIMES",
        min=1.0,
        rich_help_panel=WEIGHTS,
        help="Lower singular values that exceed this many times their layer's median to the largest one that does not, "
        "which removes spectral spikes: 8. Default: no.",
    ),
]
Device = Annotated[str, typer.Option(metavar="DEVICE", help="Device to compute on: cpu, cuda, cuda:1.")]
Seed = Annotated[
    int | None,
    typer.Option(
        metavar="N", rich_help_panel=METHOD, help="Random seed of lego's extra starts and of dare's masks. Default 0."
    ),
]
RankOption = Annotated[
    str | None,
    typer.Option(
        metavar="RANK",
        rich_help_panel=METHOD,
        help="Merged rank: a number (16), a multiple of the inputs' mean rank (1.5x), the rank that keeps a share of "
        "the sum's energy (95%), or auto (= 95%). Default 1x; for compress 95%.",
    ),
]
# options of gate training
GatesOutput = Annotated[
    Path, typer.Option("-o", "--output", rich_help_panel=OUTPUT, help="File to write (.safetensors).")
]
Steps = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        rich_help_panel=TRAINING,
        help="Number of optimizer steps. Default 100; 200 for language models.",
    ),
]
Batch = Annotated[
    int | None,
    typer.Option(metavar="N", rich_help_panel=TRAINING, help="Examples per step. Default 32; 8 for language models."),
]
LearningRate = Annotated[
    float | None,
    typer.Option("--lr", metavar="RATE", rich_help_panel=TRAINING, help="Learning rate. Default 0.01."),
]
Balance = Annotated[
    float | None,
    typer.Option(
        metavar="WEIGHT",
        rich_help_panel=TRAINING,
        help="Weight of the balance loss. Default 0; the MoLE paper uses 0.5.",
    ),
]
TrainingSeed = Annotated[
    int | None, typer.Option(metavar="N", rich_help_panel=TRAINING, help="Random seed. Default 0.")
]
Checkpointing = Annotated[
    bool,
    typer.Option(
        "--checkpointing",
        rich_help_panel=TRAINING,
        help="Gradient checkpointing: saves memory, computes every block twice.",
    ),
]
State = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        rich_help_panel=TRAINING,
        help="Folder for checkpoints: after an interruption the same command resumes from there.",
    ),
]
Granularity = Annotated[
    Literal["network", "block", "layer", "matrix"] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=GATES,
        help="One gate per network, block, layer or matrix. Default layer; for language models network.",
    ),
]
Activation = Annotated[
    Literal["sigmoid", "softmax", "softmax-null"] | None,
    typer.Option(
        metavar="NAME",
        rich_help_panel=GATES,
        help="sigmoid: independent gates. softmax: gates sum to 1 (the paper). softmax-null: softmax with a share for "
        "no LoRA. Default sigmoid; for language models softmax-null.",
    ),
]
ModelDtype = Annotated[
    DtypeName | None,
    typer.Option(
        metavar="TYPE",
        callback=lambda name: name and full_dtype_name(name),
        help="Dtype of the model: float32, bfloat16, or float16 (which loses small gradients). Default float32 on the "
        "CPU, bfloat16 elsewhere.",
    ),
]


def check_output(output: Path, format: str, inputs: list[Path], *, overwrite: bool) -> Path:
    """Return the path that will be written; raise before any work is done if it cannot be.

    Raises:
        SaveError: The output exists and may not be replaced, is one of the inputs, or its folder is missing.
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
    """Raise SaveError if an output exists and may not be replaced, or its folder is missing."""
    if not output.absolute().parent.is_dir():
        raise SaveError("The output folder does not exist.", file=output.absolute().parent, remedy="create it first")
    if output.exists() and not overwrite:
        raise SaveError("The output exists already.", file=output, remedy="choose another name, or add --overwrite")


def size_of(path: Path) -> str:
    """Return the size of a file, or of all files in a folder, as text such as ``12.3 MB``."""
    size = sum(p.stat().st_size for p in ([path] if path.is_file() else path.iterdir()))
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"
