"""`legomole demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from ..hosts.names import key_map, spelled_for
from .console import out, print_json
from .options import Json

_RANK = 8


def demo(
    folder: Annotated[Path, typer.Argument(help="Where to put the files; an earlier demo there is replaced.")] = Path(
        "legomole-demo"
    ),
    json: Json = False,
) -> None:
    """Make two small LoRAs, merge them with LEGO, and compare the methods. Downloads nothing, takes seconds."""
    from ..core.demo import write_pair
    from ..core.errors import SaveError
    from ..core.formats import save
    from ..core.merge import MergeResult
    from ..core.recipe import Input, Recipe
    from ..core.run import run

    try:
        style, subject = write_pair(folder)
    except FileExistsError as error:
        raise SaveError("The demo's folder is a file.", file=folder, remedy="name another folder") from error

    def merge(method: str, **settings: Any) -> MergeResult:
        recipe = Recipe(
            method=method, settings=settings, inputs=[Input(path=style.name), Input(path=subject.name, weight=0.8)]
        )
        return run(recipe, folder=folder, key_map=key_map, spell=spelled_for)

    result = merge("lego", rank=_RANK)
    paper = merge("lego", rank=_RANK, geometry="paper")
    merged = save(result.adapter, folder / "merged.safetensors")
    rows = [
        ("concat", "the exact sum", merge("concat").report),
        ("svd", "the nearest to the sum at this rank", merge("svd", rank=_RANK).report),
        ("lego", "clusters the units, whatever their sign and rotation", result.report),
        ("lego, paper", "as published: clusters the factors as they lie", paper.report),
        ("linear", "adds the factors as they lie", merge("linear").report),
    ]
    if json:
        kept = {name: report.energy_kept for name, _, report in rows}
        print_json({"inputs": [str(style), str(subject)], "output": str(merged), "energy_kept": kept})
        return
    table = Table(title="The same pair, method by method", title_justify="left")
    table.add_column("method")
    table.add_column("rank", justify="right")
    table.add_column("of the sum kept", justify="right")
    table.add_column("what it does")
    for name, words, report in rows:
        table.add_row(name, str(report.ranks_out[1]), f"{report.energy_kept:.1%}", words)
    console = out()
    console.print(_MADE.format(style=style, subject=subject), markup=False)
    console.print(result.report.text(), markup=False)
    console.print(_WROTE.format(merged=merged), markup=False)
    console.print(table)
    console.print(_SEEN, markup=False)


_MADE = """\
Made two LoRAs shaped like SD 1.5's first blocks, as two different trainers would write them:
  {style}    rank 8, kohya names
  {subject}  rank 4, diffusers names

Merged them with LEGO at rank 8, the subject at weight 0.8:
"""
_WROTE = """
Wrote {merged}: it loads wherever LoRAs load, and says how it was made.
  legomole inspect {merged}
"""
_SEEN = """
What you see: the two LoRAs share directions, so rank 8 holds nearly all of their 8 + 4 units. Methods that look at
the matrices (svd, lego) find that. Methods that look at the factors as they happen to lie (paper, linear) do not,
because every trainer mixes its units in a way of its own. Being near to the sum is not yet a good picture: the sum
is the yardstick here because it needs no model.
"""
