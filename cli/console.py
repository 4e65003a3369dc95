"""Output of all commands: text, JSON, errors with their exit codes, and progress bars."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
import traceback
from collections.abc import Callable, Generator
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text
from typer.core import TyperGroup

from ..core.errors import LegoMoleError, SaveError

_CONTROL = re.compile("[\x7f-\x9f\ud800-\udfff]")  # json.dumps escapes the other control characters itself

OK, BUG, USAGE, BAD_INPUT, NOT_WRITTEN, CANCELLED = 0, 1, 2, 3, 4, 130
_PIPE_CLOSED = 141  # 128 + SIGPIPE, as other programs end

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def clean(text: str) -> str:
    """Escape control characters: names and metadata come from untrusted files."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def plain(text: object) -> Text:
    """A table cell with untrusted text: no markup, no control characters."""
    return Text(clean(str(text)))


class _Output(Console):
    def print(self, *objects: Any, **kw: Any) -> None:
        super().print(*(clean(thing) if isinstance(thing, str) else thing for thing in objects), **kw)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # handled by `Commands`; rich would exit with 1, our code for a bug


def out() -> Console:
    """Standard output, for results. Created on each call, because tests and pipes replace the stream."""
    return _Output(highlight=False, soft_wrap=True)


def err() -> Console:
    """Standard error, for progress and errors."""
    return Console(stderr=True, highlight=False)


def print_json(data: object) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    typer.echo(_CONTROL.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


class Commands(TyperGroup):
    """The commands of `legomole`. Turns every error into a panel (or a JSON object) and an exit code."""

    _json = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # the reader has closed the pipe (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python reports an error at exit
            raise typer.Exit(_PIPE_CLOSED) from None
        except KeyboardInterrupt as stop:
            self._fail(CANCELLED, "Cancelled", {"problem": str(stop) or "Cancelled. Nothing was written."})
        except _UsageError as error:
            if not self._json:
                raise  # typer prints it with the usage line and exits with USAGE
            self._fail(USAGE, "Usage", {"problem": error.format_message()})  # type: ignore[attr-defined]
        except LegoMoleError as error:
            code = NOT_WRITTEN if isinstance(error, SaveError) else BAD_INPUT
            self._fail(code, type(error).__name__, _facts(error))
        except Exception as error:
            if not self._json:
                traceback.print_exc()
            self._fail(BUG, "Unexpected error", {"problem": f"{type(error).__name__}: {error}", "remedy": _REPORT})

    def _fail(self, code: int, title: str, facts: dict[str, str]) -> None:
        if self._json:
            print_json({"error": {"kind": title, **facts}, "exit_code": code})
        else:
            text = plain(facts["problem"])
            for key, label in (("file", "file"), ("module", "module"), ("expected", "expected"), ("found", "found")):
                if key in facts:
                    text.append(f"\n{label + ':':<10}", style="bold").append(clean(facts[key]))
            if "remedy" in facts:
                text.append("\nto do:    ", style="bold green").append(clean(facts["remedy"]))
            err().print(Panel(text, title=title, title_align="left", border_style="red"))
        raise typer.Exit(code)


_REPORT = "this is a bug in legomole: please report it with the lines above and the command"


def _facts(error: LegoMoleError) -> dict[str, str]:
    facts = {key: getattr(error, key) for key in ("problem", "file", "module", "expected", "found", "remedy")}
    return {key: str(value) for key, value in facts.items() if value is not None}


@contextlib.contextmanager
def progress_bar(
    title: str, *, quiet: bool, show_step: bool = False
) -> Generator[Callable[[int, int, str], None], None, None]:
    """Show a progress bar on standard error while the block runs, unless `quiet` or not on a terminal.

    Args:
        title: Name of the work.
        quiet: Show no bar.
        show_step: Show the name of the current step instead of the title.

    Yields:
        The progress callback.
    """
    with progress_bars(title, quiet=quiet, show_step=show_step) as (report,):
        yield report


@contextlib.contextmanager
def progress_bars(
    *titles: str, quiet: bool, show_step: bool = False
) -> Generator[list[Callable[[int, int, str], None]], None, None]:
    """Show a progress bar for each stage of the work, one after the other, with the time left. See `progress_bar`."""
    if quiet or not err().is_terminal:
        yield [_ignore for _ in titles]
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=err(), transient=True) as bar:

        def callback(title: str, first: bool) -> Callable[[int, int, str], None]:
            task = bar.add_task(title, total=None, visible=first, start=first)

            def report(done: int, total: int, what: str) -> None:
                if not bar.tasks[task].started:
                    bar.start_task(task)
                bar.update(
                    task, completed=done, total=total, visible=True, description=clean(what) if show_step else title
                )

            return report

        yield [callback(title, i == 0) for i, title in enumerate(titles)]


def _ignore(done: int, total: int, what: str) -> None:
    pass
