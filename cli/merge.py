"""`legomole merge` and `legomole compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .arguments import parse_input, parse_layer_rules, parse_settings
from .environment import base_path, check_device, recipe_path
from .measure_statistics import measure_statistics
from .options import (
    CALIBRATION,
    LEGO,
    METHOD,
    PAINT_STEPS,
    WEIGHTS,
    Base,
    ConvertRank,
    Device,
    Dtype,
    For,
    Format,
    Json,
    MethodName,
    Output,
    Overwrite,
    RankOption,
    Seed,
    sampling_option,
)
from .run_recipe import check_target, run_recipe

if TYPE_CHECKING:
    from ..core.recipes.recipe import Recipe

EXAMPLES = """[bold]Examples[/bold]

Two LoRAs, the second one louder, merged with LEGO at rank 16:
[cyan]legomole merge style.safetensors:0.8 subject.safetensors:1.2 --rank 16 -o both.safetensors[/cyan]

The rank that keeps 99% of the sum, and half the strength for the style's text encoder:
[cyan]legomole merge style.safetensors:0.8:0.4 subject.safetensors --rank 99% -o both.safetensors[/cyan]

LEGO as published, without the first LoRA's cross attention:
[cyan]legomole merge a.safetensors b.safetensors --geometry paper --module-weight '1:*attn2*=0' -o ab.safetensors[/cyan]

Calibrated on the base model, with pictures it generates itself:
[cyan]legomole merge style.safetensors subject.safetensors --calibrate sd15 --words 'ember style' --words heart \\
  --rank 16 -o both.safetensors[/cyan]

Repeat a merge from the file it made, or from a recipe:
[cyan]legomole merge --config both.safetensors -o again.safetensors[/cyan]
[cyan]legomole merge --config recipe.yaml --seed 1 -o variant.safetensors[/cyan]
"""
COMPRESS_EXAMPLES = """[bold]Example[/bold]

[cyan]legomole compress big.safetensors --rank 16 -o small.safetensors[/cyan]
[cyan]legomole compress big.safetensors --rank 95% -o small.safetensors[/cyan]
"""


def merge(
    output: Output,
    inputs: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="LORA[:WEIGHT[:TEXT_ENCODER_WEIGHT]]",
            help="LoRA files, PEFT folders, or names of adapters in the local Hugging Face cache (OWNER/NAME, "
            "OWNER/NAME@REVISION). Default weight 1; a negative weight subtracts.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A recipe (.yaml, .toml) or a merged file to repeat. Other options override it; LoRAs on the command "
            "line replace its whole list.",
        ),
    ] = None,
    method: Annotated[
        MethodName | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=METHOD,
            help="lego (default), concat (the exact sum), svd (nearest to the sum), ties, dare, knots, linear, or "
            "calibrated.",
        ),
    ] = None,
    rank: RankOption = None,
    geometry: Annotated[
        Literal["rank-one", "paper"] | None,
        typer.Option(
            metavar="NAME",
            rich_help_panel=LEGO,
            help="How units are compared: as rank-one matrices (rank-one, the default: independent of sign, scale and "
            "rotation of the factors) or by their raw factors (paper, as published).",
        ),
    ] = None,
    parameter_reweight: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=LEGO, help="Rescale merged units to the mean norm of their members. Default: on for paper."
        ),
    ] = None,
    output_reweight: Annotated[
        bool | None,
        typer.Option(rich_help_panel=LEGO, help="Multiply B by sqrt(r / k). Default: on for paper."),
    ] = None,
    norm: Annotated[
        Literal["inf", "l2"] | None,
        typer.Option(
            metavar="NAME", rich_help_panel=LEGO, help="Norm used by parameter reweighting: inf (default) or l2."
        ),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=METHOD,
            help="ties, dare, knots: share of entries that are kept, 0 to 1. Default 0.5.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=METHOD,
            help="calibrated, lego: activation statistics measured with these LoRAs. With --calibrate: file to write "
            "them to; default next to the output.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            rich_help_panel=CALIBRATION,
            help="Measure the statistics first, on this model: a diffusers folder of the LoRAs' base model, or its "
            "name in the local cache (OWNER/NAME or OWNER/NAME@REVISION). Default method: calibrated; lego uses them "
            "too.",
        ),
    ] = None,
    words: Annotated[list[str] | None, sampling_option("words", CALIBRATION)] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=CALIBRATION,
            help="Prompts to measure on, one per line; diverse prompts are better. Missing kinds are generated.",
        ),
    ] = None,
    size: Annotated[str | None, sampling_option("size", CALIBRATION)] = None,
    guidance: Annotated[float | None, sampling_option("guidance", CALIBRATION)] = None,
    paint_steps: Annotated[int | None, sampling_option("paint_steps", CALIBRATION)] = None,
    seed: Seed = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            rich_help_panel=METHOD,
            help="Any setting of the method without an option of its own, e.g. --set starts=4. Repeatable.",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(rich_help_panel=WEIGHTS, help="Divide the weights by the sum of their magnitudes. Default: no."),
    ] = None,
    module_weight: Annotated[
        list[str] | None,
        typer.Option(
            metavar="RULE",
            rich_help_panel=WEIGHTS,
            help="[N:]PATTERN=FACTOR. Multiply the weight of matching modules, in the N-th LoRA or in all: "
            "'1:*attn2*=0.5'. Repeatable. Module names: legomole inspect --modules.",
        ),
    ] = None,
    convert_rank: ConvertRank = None,
    base: Base = None,
    dtype: Dtype = None,
    format: Format = None,
    reader: For = None,
    device: Device = "cpu",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Merge on the processors of a Ray cluster: auto (the cluster of this machine), HOST:PORT, "
            "ray://HOST:PORT, or local (this machine only). All machines must see the inputs under the same paths.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge LoRAs into one.

    Ranks, file formats and dtypes may differ; a layer that only some of the LoRAs have is merged from those.
    The metadata of the result says how it was made, and [bold]--config[/bold] repeats it: byte for byte with the same
    versions and processor.
    """
    from ..core.merge.layer_rules import factors_by_pattern
    from ..core.recipes.compose import compose

    if calibrate is None and (words or prompts or size or guidance is not None or paint_steps):
        raise typer.BadParameter(
            "--words, --prompts, --size, --guidance and --paint-steps belong to --calibrate PIPELINE."
        )
    if ray is not None and device != "cpu":
        raise typer.BadParameter("--ray computes on the processors of a cluster: leave out --device.")
    if not inputs and config is None:
        raise typer.BadParameter("Give at least one LoRA, or a --config that names some.")
    if calibrate is not None:
        method = method or "calibrated"
        statistics = statistics or output.with_name(
            f"{output.name.removesuffix('.safetensors')}.statistics.safetensors"
        )
    previous = None if config is None else _recipe_of(config)
    entries = [parse_input(text) for text in inputs or ()]
    count = len(entries) or (0 if previous is None else len(previous.inputs))
    layer_rules = parse_layer_rules(module_weight or (), count)
    typed = {
        "rank": rank,
        "geometry": geometry,
        "parameter_reweight": parameter_reweight,
        "output_reweight": output_reweight,
        "norm": norm,
        "density": density,
        "statistics": None if statistics is None else str(statistics.absolute()),
        # with --calibrate the seed is that of the measurement; the method calibrated has none
        "seed": None if calibrate is not None and method == "calibrated" else seed,
    }
    recipe = compose(
        previous,
        inputs=[{**entry, "path": recipe_path(entry["path"])} for entry in entries],
        method=method,
        settings={**typed, **parse_settings(settings or (), {name: f"--{name.replace('_', '-')}" for name in typed})},
        module_weights=factors_by_pattern(layer_rules, None),
        input_module_weights=[factors_by_pattern(layer_rules, i) for i in range(count)],
        normalize=normalize,
        dtype=dtype,
        format=format,
        reader=reader,
        convert_rank=convert_rank,
        base_model=base_path(base),
        file=config,
    )
    folder = Path() if inputs or config is None else config.parent
    if calibrate is not None and statistics is not None:
        check_target(recipe, folder, output, overwrite=overwrite)
        check_device(device)
        _check_settings(recipe)
        measure_statistics(
            calibrate, recipe, folder, words or (), prompts, statistics, size=size, guidance=guidance,
            paint_steps=paint_steps or PAINT_STEPS, seed=seed, device=device, overwrite=overwrite, json=json,
        )  # fmt: skip
    run_recipe(recipe, folder, output, device=device, ray=ray, overwrite=overwrite, json=json)


def _recipe_of(config: Path) -> Recipe:
    """The recipe in a file; the path of its statistics is made absolute, as its inputs may be replaced."""
    from ..core.recipes.read import read_recipe

    recipe = read_recipe(config)
    if "statistics" not in recipe.settings:
        return recipe
    absolute = str((config.parent / str(recipe.settings["statistics"])).absolute())
    return recipe.model_copy(update={"settings": {**recipe.settings, "statistics": absolute}})


def _check_settings(recipe: Recipe) -> None:
    """Raise RecipeError for wrong settings, before minutes of measuring."""
    from ..core.merge.statistics import Statistics
    from ..core.recipes.method_settings import build_method

    build_method(recipe.method, {**recipe.settings, "statistics": Statistics({})})


def compress(
    input: Annotated[str, typer.Argument(metavar="LORA", help="The LoRA to make smaller.")],
    output: Output,
    rank: RankOption = None,
    method: Annotated[
        Literal["svd", "lego"],
        typer.Option(
            metavar="NAME",
            rich_help_panel=METHOD,
            help="svd: the best approximation of that rank. lego: clusters of units.",
        ),
    ] = "svd",
    seed: Seed = None,
    convert_rank: ConvertRank = None,
    base: Base = None,
    dtype: Dtype = None,
    format: Format = None,
    reader: For = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make one LoRA smaller: fewer units with (almost) the same effect."""
    from ..core.recipes.compose import compose

    recipe = compose(
        inputs=[{"path": recipe_path(input)}],
        method=method,
        settings={"rank": rank or "95%", "seed": seed},
        dtype=dtype,
        format=format,
        reader=reader,
        convert_rank=convert_rank,
        base_model=base_path(base),
    )
    run_recipe(recipe, Path(), output, device=device, overwrite=overwrite, json=json)
