"""The command line: `legomole` and `python -m legomole`. Importing it, and `--help`, load no torch."""

from __future__ import annotations

from typing import Annotated

import typer

from ..core import __version__
from . import demo, files, merge, train_gates
from .console import Commands

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Combine LoRAs without breaking them.",
    epilog="Exit codes: 0 done, 1 a bug in legomole, 2 wrong usage, 3 bad input, 4 the output could not be written, "
    "130 cancelled.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"legomole {__version__}")
        raise typer.Exit


def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Combine LoRAs without breaking them: merge, inspect, convert, compress,
    and train the gates that mix them at run time.

    New here? Run [bold]legomole demo[/bold].
    """


app.callback()(main)
app.command("merge", epilog=merge.EXAMPLES)(merge.merge)
app.command("compress", epilog=merge.COMPRESS_EXAMPLES)(merge.compress)
app.command("inspect", epilog=files.INSPECT_EXAMPLES)(files.inspect)
app.command("convert", epilog=files.CONVERT_EXAMPLES)(files.convert)
app.command("train-gates", epilog=train_gates.EXAMPLES)(train_gates.train_gates)
app.command("demo")(demo.demo)
