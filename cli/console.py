"""What all commands share: where text goes, how errors look, which exit code they have, the progress bar."""

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

_UNSHOWN = re.compile("[\x7f-\x9f\ud800-\udfff]")  # JSON escapes the other control characters itself

OK, BUG, USAGE, BAD_INPUT, NOT_WRITTEN, CANCELLED = 0, 1, 2, 3, 4, 130
_PIPE_CLOSED = 141  # 128 + SIGPIPE, as other programs end

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]


def clean(text: str) -> str:
    """The text without what would command the terminal rather than be shown: names and metadata are strangers'."""
    return text if text.isprintable() else "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def plain(text: object) -> Text:
    """A cell of a table that holds a stranger's text: no markup, nothing for the terminal."""
    return Text(clean(str(text)))


class _Output(Console):
    def print(self, *objects: Any, **kw: Any) -> None:
        super().print(*(clean(thing) if isinstance(thing, str) else thing for thing in objects), **kw)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError  # for `Commands`; rich would exit with 1, our code for a bug


def out() -> Console:
    """Standard output: results. Made anew each time, because tests (and pipes) replace the stream."""
    return _Output(highlight=False, soft_wrap=True)


def err() -> Console:
    """Standard error: progress and errors."""
    return Console(stderr=True, highlight=False)


def print_json(data: object) -> None:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    typer.echo(_UNSHOWN.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


class Commands(TyperGroup):
    """The commands of `legomole`. Turns every error into one panel (or one JSON object) and an exit code."""

    _json = False

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        self._json = "--json" in args
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort):
            raise
        except BrokenPipeError:  # the reader has seen enough (`| head`)
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains at its end
            raise typer.Exit(_PIPE_CLOSED) from None
        except KeyboardInterrupt as stop:
            self._tell(CANCELLED, "Cancelled", {"problem": str(stop) or "Cancelled. Nothing was written."})
        except _UsageError as error:
            if not self._json:
                raise  # typer shows it beside the usage line, and exits with USAGE
            self._tell(USAGE, "Usage", {"problem": error.format_message()})  # type: ignore[attr-defined]
        except LegoMoleError as error:
            code = NOT_WRITTEN if isinstance(error, SaveError) else BAD_INPUT
            self._tell(code, type(error).__name__, _facts(error))
        except Exception as error:
            if not self._json:
                traceback.print_exc()
            self._tell(BUG, "Unexpected error", {"problem": f"{type(error).__name__}: {error}", "remedy": _REPORT})

    def _tell(self, code: int, title: str, facts: dict[str, str]) -> None:
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


_REPORT = "this is a bug in legomole: please report it with the lines above and what you typed"


def _facts(error: LegoMoleError) -> dict[str, str]:
    facts = {key: getattr(error, key) for key in ("problem", "file", "module", "expected", "found", "remedy")}
    return {key: str(value) for key, value in facts.items() if value is not None}


@contextlib.contextmanager
def progress_bar(
    title: str, *, quiet: bool, telling: bool = False
) -> Generator[Callable[[int, int, str], None], None, None]:
    """A bar on standard error while the block runs; nothing when `quiet` or not on a terminal.

    Args:
        title: What is done. quiet: No bar. telling: Show what the callback is told instead of the title.

    Yields:
        The callback `merge` and `train` want: done, in all, what was done last.
    """
    with progress_bars(title, quiet=quiet, telling=telling) as (tell,):
        yield tell


@contextlib.contextmanager
def progress_bars(
    *titles: str, quiet: bool, telling: bool = False
) -> Generator[list[Callable[[int, int, str], None]], None, None]:
    """A bar for each step of the work, one after the other, see `progress_bar`. Each says what time is left."""
    if quiet or not err().is_terminal:
        yield [_tell_nobody for _ in titles]
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

        def teller(title: str, first: bool) -> Callable[[int, int, str], None]:
            task = bar.add_task(title, total=None, visible=first, start=first)

            def tell(done: int, total: int, what: str) -> None:
                if not bar.tasks[task].started:
                    bar.start_task(task)
                bar.update(
                    task, completed=done, total=total, visible=True, description=clean(what) if telling else title
                )

            return tell

        yield [teller(title, i == 0) for i, title in enumerate(titles)]


def _tell_nobody(done: int, total: int, what: str) -> None:
    pass
