"""`legomole demo`."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from .console import out, print_json, progress_bar
from .options import Json


def demo(
    folder: Annotated[Path, typer.Argument(help="Folder for the files; an earlier demo there is replaced.")] = Path(
        "legomole-demo"
    ),
    comfyui: Annotated[
        Path | None,
        typer.Option(help="Write the small model and its LoRAs (261 MB) into this ComfyUI folder instead."),
    ] = None,
    json: Json = False,
) -> None:
    """Generate pictures with two LoRAs, alone and combined in every way, side by side. Takes a minute.

    The small model, trained on drawn shapes, ships with the package; nothing is downloaded.
    """
    from ..core.errors import MergeError, SaveError

    missing = [name for name in ("diffusers", "transformers", "PIL") if find_spec(name) is None]
    if missing:
        raise MergeError(
            "The demo needs more packages.",
            expected="diffusers, transformers and Pillow",
            found=f"no {' and no '.join(missing)}",
            remedy="pip install 'legomole[diffusers]'",
        )
    if comfyui is not None:
        from ..nano.comfyui import place

        console = out()
        written = place(comfyui, say=(lambda _: None) if json else lambda text: console.print(text, markup=False))
        if json:
            print_json({"written": [str(path) for path in written]})
        else:
            console.print(_PLACED, markup=False)
        return

    from ..nano import demo as nano

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise SaveError("The demo's folder is a file.", file=folder, remedy="name another folder") from error
    with progress_bar("generating", quiet=json, show_step=True) as progress:
        columns, files = nano.run(folder, progress)
    if json:
        scores = {name: dict(column.scores) for name, column in columns.items()}
        print_json({"output": [str(path) for path in files], "scores": scores})
        return
    table = Table(title="Share of pictures that show what the prompt names", title_justify="left")
    table.add_column("prompt names")
    for name in columns:
        table.add_column(name, justify="right")
    for kind in nano.ROWS:
        table.add_row(kind, *(f"{column.scores[kind]:.0%}" for column in columns.values()))
    console = out()
    console.print(table)
    console.print(f"\nWhat you see\n{nano.summary(columns)}\n", markup=False)
    console.print(_WROTE.format(picture=files[0], merged=files[1]), markup=False)


_WROTE = """\
Wrote {picture}: look at it.
Wrote {merged}: the LEGO merge, an ordinary LoRA file.
  legomole inspect {merged}
"""
_PLACED = """
Start ComfyUI (again) and open the workflows of LegoMoLE under Templates: they run as they are.
"""
