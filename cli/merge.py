"""`legomole merge` and `legomole compress`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from .arguments import parse_input, parse_layer_rules, parse_settings, rule_to_keep
from .calibrate_merge import BaseOptions, calibrate_merge
from .choose_settings import Inputs, check_sweep, suggest_settings, sweep_settings
from .environment import base_path, check_device, recipe_path
from .options import (
    BASE,
    LEGO,
    METHOD,
    WEIGHTS,
    Base,
    Cap,
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

Measured on the base model first, which then stays as it is where neither LoRA is asked for:
[cyan]legomole merge style.safetensors subject.safetensors --base sd15 --words '1:ember style' --words 2:heart \\
  -o both.safetensors[/cyan]
[cyan]legomole merge sums/ poems/ --base ./llama --texts 1:sums.txt --instruction '2:Write a poem.' -o both/[/cyan]

Spikes capped, only the attention layers of the first LoRA, and strengths computed from norms and overlaps:
[cyan]legomole merge a.safetensors b.safetensors --cap 8 --only 1:attention --suggest -o ab.safetensors[/cyan]

The best of 14 methods, ranks and strengths, as predicted on the base model, with the ranking as a page:
[cyan]legomole merge style.safetensors subject.safetensors --base sd15 --words '1:ember style' --words 2:heart \\
  --sweep sweep.html -o both.safetensors[/cyan]

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
            help="lego (default), concat (the exact sum), svd (nearest to the sum), ties, dare, knots, linear, np, "
            "calibrated or ssr (with --base or --statistics).",
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
            help="lego, calibrated, ssr: statistics measured with these LoRAs. With --base: file to write them to.",
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            rich_help_panel=BASE,
            help="The LoRAs' base model: the folder of a diffusers pipeline or a language model, or a name in the "
            "local Hugging Face cache. Its layers are measured (as long as sampling one picture per LoRA takes), and "
            "the merge changes little where no LoRA is asked for. DoRA needs it too (with --convert-rank), and there a "
            "safetensors checkpoint is enough.",
        ),
    ] = None,
    keep_base: Annotated[
        Literal["off", "light", "thorough"] | None,
        typer.Option(
            metavar="MODE",
            rich_help_panel=BASE,
            help="light (default with --base), thorough (full statistics: gigabytes for large models), or off.",
        ),
    ] = None,
    words: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[N:]WORDS",
            rich_help_panel=BASE,
            help="Pipelines: words or phrases by which prompts name the concept of the N-th LoRA, separated by commas; "
            "or once per LoRA, in order. Default: the trigger words in its file.",
        ),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=BASE,
            help="Pipelines: prompts to measure on, one per line; diverse prompts are better. Missing kinds are "
            "generated.",
        ),
    ] = None,
    size: Annotated[str | None, sampling_option("size", BASE)] = None,
    texts: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[N:]FILE",
            rich_help_panel=BASE,
            help="Language models: texts that the N-th LoRA is for, one per line, or .jsonl as for train-gates. Four "
            "lines are enough.",
        ),
    ] = None,
    instruction: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[N:]TEXT",
            rich_help_panel=BASE,
            help="Language models: the instruction of the N-th LoRA's task, in place of texts.",
        ),
    ] = None,
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
            "'1:*attn2*=0.5', 'text-encoder=0', 'double_blocks.0-4=0.5'. Repeatable. Module names: legomole inspect "
            "--modules; names of parts: docs/recipes.md.",
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            "--keep",
            metavar="LAYERS",
            rich_help_panel=WEIGHTS,
            help="[N:]PATTERN[,PATTERN]. Keep only these layers of the N-th LoRA, or of all: '1:attention', "
            "'feed-forward,text-encoder', 'layers.8-15'. Repeatable.",
        ),
    ] = None,
    cap: Cap = None,
    equalize: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            min=0.0,
            max=1.0,
            rich_help_panel=WEIGHTS,
            help="Bring the loudness of the LoRAs together by this share: 0 not at all (default), 1 all equally loud.",
        ),
    ] = None,
    suggest: Annotated[
        bool,
        typer.Option(
            "--suggest",
            rich_help_panel=WEIGHTS,
            help="Compute strengths from the LoRAs' norms and overlaps, and settings from the findings; print them, "
            "and merge with them. Weights on the command line are multiplied; a method, rank, cap or equalize that is "
            "given stays.",
        ),
    ] = False,
    loudness: Annotated[
        Literal["each", "loudest"],
        typer.Option(
            metavar="NAME",
            rich_help_panel=WEIGHTS,
            help="With --suggest. each (default): every LoRA acts in the sum as it does alone. loudest: the sum is as "
            "loud as the loudest LoRA alone.",
        ),
    ] = "each",
    sweep: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=WEIGHTS,
            help="With --base or --statistics: predict what 14 merges keep (methods, ranks and strengths), write the "
            "ranking to FILE (.html: page with table and chart, .png: chart, .csv: table), and merge with the best.",
        ),
    ] = None,
    convert_rank: ConvertRank = None,
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
    from ..core.recipes.method_settings import with_statistics
    from ..hosts.calibration import why_not_measured

    if base is None and (words or prompts or size or texts or instruction or keep_base):
        raise typer.BadParameter(
            "--keep-base, --words, --prompts, --size, --texts and --instruction belong to --base MODEL."
        )
    path_of_base = base_path(base)
    obstacle = why_not_measured(path_of_base)
    if obstacle and (words or prompts or size or texts or instruction or keep_base not in (None, "off")):
        raise typer.BadParameter(
            f"--base: {obstacle}. Give the folder of a diffusers pipeline or of a language model, or leave out "
            "--keep-base, --words, --prompts, --size, --texts and --instruction."
        )
    if ray is not None and device != "cpu":
        raise typer.BadParameter("--ray computes on the processors of a cluster: leave out --device.")
    if not inputs and config is None:
        raise typer.BadParameter("Give at least one LoRA, or a --config that names some.")
    previous = None if config is None else _recipe_of(config)
    entries = [parse_input(text) for text in inputs or ()]
    count = len(entries) or (0 if previous is None else len(previous.inputs))
    layer_rules = parse_layer_rules([*(module_weight or ()), *map(rule_to_keep, only or ())], count)
    typed = {
        "rank": rank,
        "geometry": geometry,
        "parameter_reweight": parameter_reweight,
        "output_reweight": output_reweight,
        "norm": norm,
        "density": density,
        # with --base the file is written first
        "statistics": None if statistics is None or base is not None else str(statistics.absolute()),
        # the seed of the measurement; calibrated and ssr have none
        "seed": None if base is not None and method in ("calibrated", "ssr") else seed,
    }
    recipe = compose(
        previous,
        inputs=[{**entry, "path": recipe_path(entry["path"])} for entry in entries],
        method=method,
        settings={**typed, **parse_settings(settings or (), {name: f"--{name.replace('_', '-')}" for name in typed})},
        module_weights=factors_by_pattern(layer_rules, None),
        input_module_weights=[factors_by_pattern(layer_rules, i) for i in range(count)],
        normalize=normalize,
        cap=cap,
        equalize=equalize,
        dtype=dtype,
        format=format,
        reader=reader,
        convert_rank=convert_rank,
        base_model=path_of_base,
        file=config,
    )
    folder = Path() if inputs or config is None else config.parent
    if sweep is not None:
        check_sweep(sweep, method, has_statistics=base is not None or statistics is not None, overwrite=overwrite)
    measured, path, notes = None, None, (obstacle,) if obstacle and keep_base is None else ()
    if path_of_base is not None and not obstacle and keep_base != "off":
        check_target(recipe, folder, output, overwrite=overwrite)
        check_device(device)
        _check_settings(recipe)
        options = BaseOptions(
            path_of_base, keep_base or "light", words or (), texts or (), instruction or (), prompts, size, seed
        )
        target = None if statistics is None else statistics.absolute()
        measured, path, note = calibrate_merge(
            options, recipe, folder, target, device=device, overwrite=overwrite, json=json
        )
        recipe, notes = with_statistics(recipe, path), (note,) if note else ()
    suggestion = swept = None
    if suggest or sweep is not None:
        inputs_for = Inputs.load(recipe, folder, measured, notes)
        chosen = method is not None or config is not None or any(value is not None for value in typed.values())
        if suggest:
            suggestion = suggest_settings(
                recipe, inputs_for, loudness, choose_method=not (chosen or base is not None or sweep), quiet=json
            )
            recipe = suggestion.apply(recipe)
        if sweep is not None:
            swept = sweep_settings(recipe, inputs_for, sweep, device=device, quiet=json)
            recipe = with_statistics(swept.apply(recipe), path or inputs_for.statistics_path)
    run_recipe(
        recipe, folder, output, measured=measured, notes=notes, suggestion=suggestion, swept=swept, device=device,
        ray=ray, overwrite=overwrite, json=json,
    )  # fmt: skip


def _recipe_of(config: Path) -> Recipe:
    """The recipe in a file; the path of its statistics is made absolute, as its inputs may be replaced.

    Statistics that are not beside the file may be in the cache of measured statistics.
    """
    from ..core.merge.statistics_cache import find_cached_file
    from ..core.recipes.read import read_recipe

    recipe = read_recipe(config)
    if "statistics" not in recipe.settings:
        return recipe
    name = str(recipe.settings["statistics"])
    beside = config.parent / name
    path = beside if beside.exists() else find_cached_file(name) or beside
    return recipe.model_copy(update={"settings": {**recipe.settings, "statistics": str(path.absolute())}})


def _check_settings(recipe: Recipe) -> None:
    """Raise RecipeError for wrong settings, before anything is measured."""
    from ..core.merge.statistics import Statistics
    from ..core.recipes.method_settings import build_method, takes_statistics

    statistics = {"statistics": Statistics({})} if takes_statistics(recipe.method) else {}
    build_method(recipe.method, {**recipe.settings, **statistics})


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
