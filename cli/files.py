"""`legomole inspect` and `legomole convert`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from ..core.errors import FormatError, LegoMoleError, name_some
from ..hosts.names import key_map, rename_for_format
from .console import clean, out, plain, print_json
from .environment import base_path, local_path
from .findings_report import findings_of, print_findings
from .gates_report import gates_facts, print_gates, report_broken_record
from .options import Base, Cap, ConvertRank, Dtype, For, FormatName, Json, Output, Overwrite, check_output, size_of
from .plot_report import check_plot, print_summary, survey_files, write_plot

if TYPE_CHECKING:
    from ..core.adapter import Adapter
    from ..core.formats import Summary
    from ..core.merge.report import MergeReport

INSPECT_EXAMPLES = """[bold]Examples[/bold]

[cyan]legomole inspect style.safetensors[/cyan]
[cyan]legomole inspect style.safetensors --modules | grep attn2[/cyan]
[cyan]legomole inspect style.safetensors subject.safetensors[/cyan]  (how similar are they, and what is wrong?)
[cyan]legomole inspect style.safetensors --base sd15.safetensors[/cyan]  (is it larger than the weights?)
[cyan]legomole inspect style.safetensors subject.safetensors --plot report.html[/cyan]  (and where?)
[cyan]legomole inspect merged.safetensors --recipe > recipe.yaml[/cyan]
"""
CONVERT_EXAMPLES = """[bold]Examples[/bold]

[cyan]legomole convert lokr.safetensors --convert-rank 32 -o lora.safetensors[/cyan]
[cyan]legomole convert fp32.safetensors --dtype float16 -o small.safetensors[/cyan]
[cyan]legomole convert kohya.safetensors --to diffusers -o for_diffusers.safetensors[/cyan]
"""

_MAX_VALUE = 60  # characters of a metadata value that are shown


def inspect(
    paths: Annotated[list[Path], typer.Argument(metavar="LORA", help="LoRA files, PEFT folders, gates files.")],
    modules: Annotated[bool, typer.Option("--modules", help="List the module names, one per line.")] = False,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print only the recipe of a merged file, as YAML.")] = False,
    plot: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Write a report of the LoRAs as a picture (.png) or as a page with tables (.html): overlap and energy "
            "by block, spectrum, origin of LEGO's units, a map of the units, and findings.",
        ),
    ] = None,
    rank: Annotated[
        str | None,
        typer.Option(metavar="RANK", help="Rank of the LEGO merge in the report. Default 1x, see merge --rank."),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="FILE_OR_FOLDER",
            help="Base model to compare the LoRAs with: a safetensors checkpoint, a diffusers or transformers folder, "
            "or a name in the local Hugging Face cache. Finds LoRAs larger than the weights they change, and intruder "
            "directions. Takes seconds per layer of a large model.",
        ),
    ] = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Show what LoRA files contain: format, ranks, dtypes, metadata, and how they were merged.

    Files that cannot be merged are shown by their header alone. Findings are faults and risks of the LoRAs, each with
    its value, its threshold and what to do. Of several LoRAs it shows the overlap. Of gates files it shows the LoRAs,
    the settings and the training.
    """
    from ..core.formats import summarise
    from ..core.survey.summary import summary_lines

    if plot is not None:
        if modules or recipe:
            raise typer.BadParameter("--plot excludes --modules and --recipe.")
        check_plot(plot, overwrite=overwrite)
    elif rank is not None:
        raise typer.BadParameter("--rank is for --plot.")
    paths = [local_path(path) for path in paths]
    summaries = [summarise(path) for path in paths]
    loras = [path for path, summary in zip(paths, summaries, strict=True) if not _is_gates_file(summary)]
    if recipe:
        _print_recipes(summaries, json)
        return
    if modules and not json:
        for summary in summaries:
            out().print("\n".join(map(clean, summary.names)), markup=False)
        return
    surveyed = None
    if plot is not None:
        surveyed = survey_files(loras, rank, quiet=json)
        write_plot(*surveyed, plot)
    examined = None if surveyed is None else (surveyed[1], surveyed[0].report)
    obstacle = ""
    if examined is None and loras:
        try:
            examined = _examined(loras)
        except LegoMoleError as error:
            if len(loras) > 1:
                raise
            obstacle = str(error)  # one file is shown all the same
    overlap = None if examined is None or len(loras) < 2 else _overlap(loras, *examined)
    findings = None if examined is None else findings_of(*examined, base_path(base))
    if json:
        data: dict[str, Any] = {"files": [_facts(summary) for summary in summaries]}
        data |= {} if overlap is None else {"overlap": overlap}
        data |= {} if findings is None else {"findings": [dataclasses.asdict(finding) for finding in findings]}
        data |= {"findings_missing": obstacle} if obstacle else {}
        data |= {} if surveyed is None else {"summary": summary_lines(surveyed[0]), "plot": str(plot)}
        print_json(data)
        return
    for summary in summaries:
        _print_summary(summary)
    if overlap is not None:
        _print_overlap(overlap)
    if examined is not None and findings is not None:
        print_findings(examined[1].inputs, findings)
    elif obstacle:
        out().print(f"no findings, because the LoRA cannot be merged: {obstacle}", markup=False)
    if surveyed is not None and plot is not None:
        print_summary(surveyed[0], plot)


def _is_gates_file(summary: Summary) -> bool:
    return summary.metadata.get("kind", "").startswith("legomole.gates.")


def _facts(summary: Summary) -> dict[str, Any]:
    """A file's summary as plain data."""
    if _is_gates_file(summary):
        from ..core.mole.trained import TrainedGates

        with report_broken_record(summary.path):
            return {"path": summary.path, "format": "gates", **gates_facts(TrainedGates.load(summary.path))}
    data: dict[str, Any] = {field.name: getattr(summary, field.name) for field in dataclasses.fields(summary)}
    record = data["metadata"].get("legomole")
    plain_data = {key: dict(value) if isinstance(value, Mapping) else value for key, value in data.items()}
    return plain_data | {
        "base_model": _base_model(summary),
        "legomole": _merge_record(record, summary.path) if record else None,
    }


def _merge_record(text: str, path: str) -> Any:
    """Recipe and report in the metadata of a merged file, as plain data."""
    from ..core.json_text import from_json

    try:
        return from_json(text)
    except ValueError as error:
        raise FormatError("The record of the merge in the file is broken.", file=path, found=error) from error


def _base_model(summary: Summary) -> str:
    from ..core.adapter import base_model

    return base_model(summary.metadata) or "unknown (not in the metadata)"


def _print_summary(summary: Summary) -> None:
    from ..core.mole.trained import TrainedGates
    from ..core.recipes.read import recipe_in

    if _is_gates_file(summary):
        with report_broken_record(summary.path):
            print_gates(summary.path, TrainedGates.load(summary.path))
        return
    table = Table(title=plain(summary.path), title_justify="left", title_style="bold", show_header=False, box=None)
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("format", summary.format)
    table.add_row("base model", plain(_base_model(summary)))
    table.add_row("modules", str(summary.modules))
    table.add_row("ranks", _counts(summary.ranks) or "none: no plain low-rank modules")
    table.add_row("dtypes", _counts(summary.dtypes))
    table.add_row("tensors", _counts(summary.roles))
    if summary.others:
        table.add_row("other keys", plain(f"{len(summary.others)}: {name_some(summary.others)}"))
    table.add_row("size", size_of(Path(summary.path)))
    for key, value in sorted(summary.metadata.items()):
        if key != "legomole":
            line = " ".join(value.split())
            shown = line if len(line) <= _MAX_VALUE else f"{line[:_MAX_VALUE]}.. ({len(value)} characters)"
            table.add_row(plain(f"· {key}"), plain(shown))
    recipe = recipe_in(summary.metadata, summary.path)
    if recipe is not None:
        inputs = ", ".join(f"{entry.path}:{entry.weight:g}" for entry in recipe.inputs)
        table.add_row("merged from", plain(inputs))
        settings = ", ".join(f"{key} {value}" for key, value in recipe.settings.items())
        by = f"legomole {recipe.legomole}, {recipe.method}{f' ({settings})' if settings else ''}"
        table.add_row("merged by", plain(by))
        if recipe.conversions:
            steps = [" ".join(filter(None, (step.format, step.dtype))) for step in recipe.conversions]
            table.add_row("converted to", plain(", ".join(steps)))
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


def _examined(paths: Sequence[Path]) -> tuple[Sequence[Adapter], MergeReport]:
    """Aligned LoRAs, and a report on their sound layers."""
    import torch

    from ..core.formats import load
    from ..core.layers.align import align
    from ..core.survey.sound import NoMerge, merge_sound_layers

    adapters = align([load(path, verify=False) for path in paths], key_map=key_map)
    return adapters, merge_sound_layers(adapters, NoMerge(), dtype=torch.float32).report


def _overlap(paths: Sequence[Path], adapters: Sequence[Adapter], report: MergeReport) -> dict[str, Any]:
    """Number of modules that each pair shares, and the cosine of their deltas there."""
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


def _print_overlap(overlap: Mapping[str, Any]) -> None:
    table = Table(title="Overlap (1: the same direction, 0: unrelated, -1: opposite)", title_justify="left")
    for column in ("first", "second", "shared modules", "cosine"):
        table.add_column(column, justify="right" if column in ("shared modules", "cosine") else "left")
    for pair in overlap["pairs"]:
        table.add_row(*map(plain, pair["files"]), str(pair["shared_modules"]), f"{pair['cosine']:+.3f}")
    out().print(table)


def convert(
    input: Annotated[Path, typer.Argument(metavar="LORA", help="A LoRA file or PEFT folder.")],
    output: Output,
    to: Annotated[
        FormatName | None,
        typer.Option(metavar="NAME", help="File format: kohya, diffusers, peft or comfy. Default: keep it."),
    ] = None,
    reader: For = None,
    dtype: Dtype = None,
    only: Annotated[
        str | None,
        typer.Option(
            "--only",
            "--keep",
            metavar="LAYERS",
            help="PATTERN[,PATTERN]. Keep only these layers: 'attention', 'feed-forward,text-encoder', 'layers.8-15'.",
        ),
    ] = None,
    cap: Cap = None,
    convert_rank: ConvertRank = None,
    base: Base = None,
    overwrite: Overwrite = False,
    json: Json = False,
) -> None:
    """Write a LoRA in another file format or dtype, or a LoHa, LoKr or DoRA as a plain LoRA."""
    import torch

    from ..core.formats import load, save
    from ..core.formats.loss import energy_kept
    from ..core.recipes.conversion import convert as convert_adapter
    from ..core.recipes.output import name_output

    input = local_path(input)
    adapter = load(input, convert_rank=convert_rank, base=base_path(base))
    original, format = name_output(
        adapter, first_format=adapter.source.format, format=to, reader=reader, rename_for_format=rename_for_format
    )
    target = check_output(output, format, [input], overwrite=overwrite)
    keep_names = to is None and reader is None and original.layers == adapter.layers
    adapter = convert_adapter(
        adapter,
        None if keep_names else format,
        None if dtype is None else getattr(torch, dtype),
        reader=reader,
        rename_for_format=rename_for_format,
        only=only,
        cap=cap,
    )
    written = save(adapter, target, format=format)
    kept = energy_kept(original, load(written))
    if json:
        data = {"output": str(written), "format": format, "modules": len(adapter.modules), "energy_kept": kept}
        print_json({**data, "notes": list(adapter.notes)})
    else:
        for note in adapter.notes:
            out().print(f"note: {note}", markup=False)
        out().print(f"{kept:.4%} of the LoRA's energy kept", markup=False)
        out().print(f"wrote {written} ({format}, {len(adapter.modules)} modules, {size_of(written)})", markup=False)
