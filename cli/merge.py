"""`legomole merge` and `legomole compress`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from .arguments import add_module_weights, parse_input, parse_setting
from .calibration import measure
from .environment import check_device, named
from .options import (
    CALIBRATION,
    GUIDANCE_HELP,
    LEGO,
    METHOD,
    PAINT_STEPS_HELP,
    SIZE_HELP,
    WEIGHTS,
    WORDS_HELP,
    ConvertRank,
    Device,
    Dtype,
    Format,
    Json,
    MethodName,
    Output,
    Overwrite,
    RankOption,
    Seed,
)
from .run_recipe import check_target, ranked, run_recipe

EXAMPLES = """[bold]Examples[/bold]

Two LoRAs, the second one louder, merged with LEGO at rank 16:
[cyan]legomole merge style.safetensors:0.8 subject.safetensors:1.2 --rank 16 -o both.safetensors[/cyan]

As much rank as 99% of the sum needs, text encoder at half strength for the style:
[cyan]legomole merge style.safetensors:0.8:0.4 subject.safetensors --rank 99% -o both.safetensors[/cyan]

LEGO as published, keeping the first LoRA out of the cross attention:
[cyan]legomole merge a.safetensors b.safetensors --geometry paper --module-weight '1:*attn2*=0' -o ab.safetensors[/cyan]

The best of both on this very model, measured on its own pictures:
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
            "OWNER/NAME@REVISION). Weight 1 if not given; negative subtracts.",
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A recipe (.yaml, .toml) or a merged file to repeat. What you type besides overrides it; LoRAs you "
            "type replace its whole list.",
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
            help="Compare units as rank-one matrices (rank-one, the default: whatever their sign, scale and rotation) "
            "or by their factors as they lie (paper, as published).",
        ),
    ] = None,
    parameter_reweight: Annotated[
        bool | None,
        typer.Option(rich_help_panel=LEGO, help="Give merged units their members' mean norm. Default: on for paper."),
    ] = None,
    output_reweight: Annotated[
        bool | None,
        typer.Option(rich_help_panel=LEGO, help="Multiply B by sqrt(r / k). Default: on for paper."),
    ] = None,
    norm: Annotated[
        Literal["inf", "l2"] | None,
        typer.Option(metavar="NAME", rich_help_panel=LEGO, help="Of the parameter reweighting: inf (default) or l2."),
    ] = None,
    density: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            rich_help_panel=METHOD,
            help="ties, dare, knots: share of entries to keep, 0 to 1. Default 0.5.",
        ),
    ] = None,
    statistics: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=METHOD,
            help="calibrated, lego: activation statistics measured with these LoRAs. With --calibrate: where to keep "
            "them; default beside the output.",
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="PIPELINE",
            rich_help_panel=CALIBRATION,
            help="Measure the statistics now: a diffusers folder of the LoRAs' base model, or its name in the local "
            "cache. The method is calibrated then, unless you say lego.",
        ),
    ] = None,
    words: Annotated[
        list[str] | None, typer.Option(metavar="WORDS", rich_help_panel=CALIBRATION, help=WORDS_HELP)
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            rich_help_panel=CALIBRATION,
            help="Prompts to measure on, one a line; the more unlike, the better. Kinds that are missing are made up.",
        ),
    ] = None,
    size: Annotated[str | None, typer.Option(metavar="WxH", rich_help_panel=CALIBRATION, help=SIZE_HELP)] = None,
    guidance: Annotated[
        float | None,
        typer.Option(metavar="SCALE", rich_help_panel=CALIBRATION, help=GUIDANCE_HELP),
    ] = None,
    paint_steps: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, rich_help_panel=CALIBRATION, help=f"{PAINT_STEPS_HELP} Default 12."),
    ] = None,
    seed: Seed = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            rich_help_panel=METHOD,
            help="Any other setting of the method, e.g. --set starts=4. Repeatable.",
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
            help="[N:]PATTERN=FACTOR. Multiply the weight of matching modules, of the N-th LoRA or of all: "
            "'1:*attn2*=0.5'. Repeatable; module names: legomole inspect --modules.",
        ),
    ] = None,
    convert_rank: ConvertRank = None,
    dtype: Dtype = None,
    format: Format = None,
    device: Device = "cpu",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Compute on the processors of a Ray cluster: auto (the one this machine belongs to), HOST:PORT, "
            "ray://HOST:PORT, or local (this machine). All machines must see the inputs under the same paths.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Merge LoRAs into one.

    Ranks, file formats and number formats may differ; a layer that only some of them have is merged from those.
    The result says in its metadata how it was made, and [bold]--config[/bold] repeats it, byte for byte.
    """
    from ..core.merge.statistics import Statistics
    from ..core.recipes.method_settings import build_method
    from ..core.recipes.read import read_recipe
    from ..core.recipes.text import recipe_from_data

    if calibrate is None and (words or prompts or size or guidance is not None or paint_steps):
        raise typer.BadParameter(
            "--words, --prompts, --size, --guidance and --paint-steps belong to --calibrate PIPELINE."
        )
    if ray is not None and device != "cpu":
        raise typer.BadParameter("With --ray the processors compute: leave out --device.")
    base: dict[str, Any] = {"method": "lego" if calibrate is None else "calibrated"}
    folder = Path()
    if config is not None:
        folder = config.parent
        base = read_recipe(config).model_dump(exclude_unset=True)
        if "statistics" in base.get("settings", {}):
            base["settings"]["statistics"] = str((folder / base["settings"]["statistics"]).absolute())
    if inputs:
        folder = Path()
        entries = [parse_input(text) for text in inputs]
        base["inputs"] = [{**entry, "path": named(entry["path"])} for entry in entries]
    if not base.get("inputs"):
        raise typer.BadParameter("Give at least one LoRA, or a --config that names some.")
    if calibrate is not None:
        statistics = statistics or output.with_name(
            f"{output.name.removesuffix('.safetensors')}.statistics.safetensors"
        )
        method = method or "calibrated"
    other = method is not None and method != base["method"]
    if other:
        base = {**base, "method": method, "settings": {}}  # settings of another method would only be refused
    if other or statistics is not None:
        base.pop("statistics_sha256", None)  # it was of the config's statistics
    typed = {
        "rank": rank,
        "geometry": geometry,
        "parameter_reweight": parameter_reweight,
        "output_reweight": output_reweight,
        "norm": norm,
        "density": density,
        "statistics": None if statistics is None else str(statistics.absolute()),
        "seed": None if calibrate is not None and method == "calibrated" else seed,  # of the measuring alone
        **dict(parse_setting(text) for text in settings or ()),
    }
    base["settings"] = {**base.get("settings", {}), **_given(typed)}
    base |= _given({"normalize": normalize, "dtype": dtype, "format": format, "convert_rank": convert_rank})
    if convert_rank is not None:  # for every input, also those that have one of their own in the config
        base["inputs"] = [{k: v for k, v in entry.items() if k != "convert_rank"} for entry in base["inputs"]]
    add_module_weights(base, module_weight or ())
    recipe = recipe_from_data(base, config)
    if calibrate is not None and statistics is not None:
        check_target(recipe, folder, output, overwrite=overwrite)
        check_device(device)
        # wrong settings are told before minutes of measuring
        build_method(recipe.method, {**ranked(recipe).settings, "statistics": Statistics({})})
        measure(
            calibrate, recipe, folder, words or (), prompts, statistics, size=size, guidance=guidance,
            paint_steps=paint_steps or 12, seed=seed, device=device, overwrite=overwrite, json=json,
        )  # fmt: skip
    run_recipe(recipe, folder, output, device=device, ray=ray, overwrite=overwrite, json=json)


def compress(
    input: Annotated[str, typer.Argument(metavar="LORA", help="The LoRA to make smaller.")],
    output: Output,
    rank: RankOption = None,
    method: Annotated[
        Literal["svd", "lego"],
        typer.Option(
            metavar="NAME",
            rich_help_panel=METHOD,
            help="svd: the nearest LoRA of that rank. lego: clusters of units.",
        ),
    ] = "svd",
    seed: Seed = None,
    convert_rank: ConvertRank = None,
    dtype: Dtype = None,
    format: Format = None,
    device: Device = "cpu",
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Make one LoRA smaller: fewer units that do (almost) the same."""
    from ..core.recipes.text import recipe_from_data

    data = _given({"method": method, "dtype": dtype, "format": format, "convert_rank": convert_rank})
    settings = _given({"rank": rank or "95%", "seed": seed})
    recipe = recipe_from_data({**data, "inputs": [{"path": named(input)}], "settings": settings})
    run_recipe(recipe, Path(), output, device=device, overwrite=overwrite, json=json)


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}
