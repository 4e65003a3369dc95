"""`legomole inspect` and `legomole convert`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..core.errors import FormatError, name_some
from ..hosts.names import key_map, rename_for_format
from .console import clean, out, plain, print_json
from .environment import local_path
from .gates_report import gates_facts, print_gates, report_broken_record
from .options import ConvertRank, Dtype, FormatName, Json, Output, Overwrite, check_output, size_of
from .report import check_plot, surveyed, tell_plot, write_plot

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.formats import Summary
    from ..core.merge.report import MergeReport

INSPECT_EXAMPLES = """[bold]Examples[/bold]

[cyan]legomole inspect style.safetensors[/cyan]
[cyan]legomole inspect style.safetensors --modules | grep attn2[/cyan]
[cyan]legomole inspect style.safetensors subject.safetensors[/cyan]  (how alike are they?)
[cyan]legomole inspect style.safetensors subject.safetensors --plot report.html[/cyan]  (and where?)
[cyan]legomole inspect merged.safetensors --recipe > recipe.yaml[/cyan]
"""
CONVERT_EXAMPLES = """[bold]Examples[/bold]

[cyan]legomole convert lokr.safetensors --convert-rank 32 -o lora.safetensors[/cyan]
[cyan]legomole convert fp32.safetensors --dtype float16 -o small.safetensors[/cyan]
[cyan]legomole convert kohya.safetensors --to diffusers -o for_diffusers.safetensors[/cyan]
"""

_SHOWN = 60  # characters of a metadata value


def inspect(
    paths: Annotated[list[Path], typer.Argument(metavar="LORA", help="LoRA files, PEFT folders, gates.")],
    modules: Annotated[bool, typer.Option("--modules", help="List the module names, one a line.")] = False,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print only the recipe of a merged file, as YAML.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw a report of the LoRAs, as a picture (.png) or as a page with tables (.html): overlap and energy "
            "by block, spectrum, where LEGO's units come from, a map of the units, and a summary.",
        ),
    ] = None,
    tsne: Annotated[
        bool, typer.Option("--tsne", help="Draw the map of units by t-SNE (needs scikit-learn) instead of PCA.")
    ] = False,
    rank: Annotated[
        str | None, typer.Option(metavar="RANK", help="Of the LEGO merge in the report. Default 1x, see merge --rank.")
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Look inside LoRA files: format, ranks, number formats, metadata, and how they were merged.

    Reads only the header, so it also works for files that cannot be merged. Several files: how far they overlap.
    Of gates (train-gates) it tells the LoRAs, the settings and the training.
    """
    from ..core.formats import summarise
    from ..core.survey.findings import sentences

    if plot is not None:
        if modules or recipe:
            raise typer.BadParameter("--plot goes with neither --modules nor --recipe.")
        check_plot(plot, overwrite=overwrite)
    elif tsne or rank is not None:
        raise typer.BadParameter("--tsne and --rank are for --plot.")
    paths = [local_path(path) for path in paths]
    summaries = [summarise(path) for path in paths]
    loras = [path for path, summary in zip(paths, summaries, strict=True) if not _holds_gates(summary)]
    if recipe:
        _print_recipes(summaries, json)
        return
    if modules and not json:
        for summary in summaries:
            out().print("\n".join(map(clean, summary.names)), markup=False)
        return
    looked = None
    if plot is not None:
        looked = surveyed(loras, rank, by_tsne=tsne, quiet=json)
        write_plot(*looked, plot)
    met = None
    if len(loras) > 1:
        met = _overlap(loras, *_merged(loras) if looked is None else (looked[1], looked[0].report))
    if json:
        data: dict[str, Any] = {"files": [_plain(summary) for summary in summaries]}
        data |= {} if met is None else {"overlap": met}
        data |= {} if looked is None else {"summary": sentences(looked[0]), "plot": str(plot)}
        print_json(data)
        return
    for summary in summaries:
        _show(summary)
    if met is not None:
        _show_overlap(met)
    if looked is not None and plot is not None:
        tell_plot(looked[0], plot)


def _holds_gates(summary: Summary) -> bool:
    return summary.metadata.get("kind", "").startswith("legomole.gates.")


def _plain(summary: Summary) -> dict[str, Any]:
    if _holds_gates(summary):
        from ..core.mole.trained import TrainedGates

        with report_broken_record(summary.path):
            return {"path": summary.path, "format": "gates", **gates_facts(TrainedGates.load(summary.path))}
    data: dict[str, Any] = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    made = data["metadata"].get("legomole")
    plain = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    return plain | {"base_model": base_model(summary), "legomole": _made(made, summary.path) if made else None}


def _made(text: str, path: str) -> Any:
    """Recipe and report as plain data."""
    from ..core.json_text import from_json

    try:
        return from_json(text)
    except ValueError as error:
        raise FormatError("What the file says of its merge is broken.", file=path, found=error) from error


def base_model(summary: Summary) -> str:
    """What the metadata says the LoRA was trained on, in its own words; ``unknown`` where it does not say."""
    from ..core import adapter

    return adapter.base_model(summary.metadata) or "unknown (the metadata does not say)"


def _show(summary: Summary) -> None:
    from ..core.mole.trained import TrainedGates
    from ..core.recipes.read import recipe_in

    if _holds_gates(summary):
        with report_broken_record(summary.path):
            print_gates(summary.path, TrainedGates.load(summary.path))
        return
    table = Table(title=plain(summary.path), title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("format", summary.format)
    table.add_row("base model", plain(base_model(summary)))
    table.add_row("modules", str(summary.modules))
    table.add_row("ranks", _counts(summary.ranks) or "none: no plain low-rank modules")
    table.add_row("numbers", _counts(summary.dtypes))
    table.add_row("holds", _counts(summary.roles))
    if summary.others:
        table.add_row("other keys", plain(f"{len(summary.others)}: {name_some(summary.others)}"))
    table.add_row("size", size_of(Path(summary.path)))
    for key, value in sorted(summary.metadata.items()):
        if key != "legomole":
            line = " ".join(value.split())
            shown = line if len(line) <= _SHOWN else f"{line[:_SHOWN]}.. ({len(value)} characters)"
            table.add_row(plain(f"· {key}"), plain(shown))
    made = recipe_in(summary.metadata, summary.path)
    if made is not None:
        inputs = ", ".join(f"{entry.path}:{entry.weight:g}" for entry in made.inputs)
        table.add_row("merged from", plain(inputs))
        settings = ", ".join(f"{key} {value}" for key, value in made.settings.items())
        by = f"legomole {made.legomole}, {made.method}{f' ({settings})' if settings else ''}"
        table.add_row("merged by", plain(by))
    out().print(table)
    out().print()


def _counts(counts: Mapping[Any, int]) -> str:
    return ", ".join(f"{name}" if len(counts) == 1 else f"{name} ({n})" for name, n in counts.items())


def _print_recipes(summaries: Sequence[Summary], json: bool) -> None:
    from ..core.recipes.read import read_recipe
    from ..core.recipes.text import recipe_to_text

    for summary in summaries:
        recipe = read_recipe(Path(summary.path), allow_any_path=True)
        if json:
            print_json(recipe.to_dict())
        else:
            typer.echo(recipe_to_text(recipe), nl=False)


def _merged(paths: Sequence[Path]) -> tuple[Sequence[Adapter], MergeReport]:
    """LoRAs under common names, and the report of their sum."""
    from ..core.formats import load
    from ..core.layers.align import align
    from ..core.merge.engine import merge
    from ..core.merge.methods.concat import Concat

    adapters = align([load(path) for path in paths], key_map=key_map)
    return adapters, merge(adapters, Concat()).report


def _overlap(paths: Sequence[Path], adapters: Sequence[Adapter], report: MergeReport) -> dict[str, Any]:
    """How many modules each pair shares, and how alike their deltas are there."""
    pairs = [(i, j) for i in range(len(paths)) for j in range(i + 1, len(paths))]
    cosine = report.overlap()
    return {
        "modules": {str(path): len(adapter.modules) for path, adapter in zip(paths, adapters, strict=True)},
        "pairs": [
            {
                "files": [str(paths[i]), str(paths[j])],
                "shared_modules": len(set(adapters[i].modules) & set(adapters[j].modules)),
                "cosine": cosine[i][j],
            }
            for i, j in pairs
        ],
    }


def _show_overlap(met: Mapping[str, Any]) -> None:
    table = Table(title="Overlap (1: the same direction, 0: unrelated, -1: opposite)", title_justify="left")
    for column in ("first", "second", "shared modules", "cosine"):
        table.add_column(column, justify="right" if column in ("shared modules", "cosine") else "left")
    for pair in met["pairs"]:
        table.add_row(*map(plain, pair["files"]), str(pair["shared_modules"]), f"{pair['cosine']:+.3f}")
    out().print(table)


def convert(
    input: Annotated[Path, typer.Argument(metavar="LORA", help="A LoRA file or PEFT folder.")],
    output: Output,
    to: Annotated[
        FormatName | None,
        typer.Option(metavar="NAME", help="kohya, diffusers, peft or comfy. Default: the one it has."),
    ] = None,
    dtype: Dtype = None,
    convert_rank: ConvertRank = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a LoRA in another file format or number format, or a LoHa or LoKr as a plain LoRA."""
    import torch

    from ..core.formats import load, save

    input = local_path(input)
    adapter = load(input, convert_rank=convert_rank)
    format = to or adapter.source.format
    target = check_output(output, format, [input], overwrite=overwrite)
    adapter = rename_for_format(adapter, format)
    written = save(adapter, target, format=format, dtype=None if dtype is None else getattr(torch, dtype))
    if json:
        print_json({"output": str(written), "format": format, "modules": len(adapter.modules)})
    else:
        out().print(f"wrote {written} ({format}, {len(adapter.modules)} modules, {size_of(written)})", markup=False)
