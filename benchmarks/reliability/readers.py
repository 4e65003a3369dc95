"""Readings of a fuzzed input: everything that legomole does with a file of its kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from legomole.cli import app
from legomole.cli.gates_input import read_texts
from legomole.core.errors import LegoMoleError
from legomole.core.formats import FORMATS, load, save, summarise
from legomole.core.merge.methods import METHODS
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.trained import TrainedGates
from legomole.core.recipes.read import read_recipe
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.remote import RemoteInputs
from legomole.core.recipes.run import run
from legomole.core.recipes.text import recipe_to_text
from legomole.core.train.state import FitRecord, resume_state
from legomole.hosts.hub import cached_folder
from legomole.hosts.names import key_map, rename_for_format
from legomole.hosts.transformers.training import load_model
from typer.testing import CliRunner

from .cases import Case, sound


class Defect(Exception):
    """A result that is neither success nor an error of ours."""


def readings(case: Case, number: int) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield names and functions of a case's readings, which must succeed or raise `LegoMoleError`.

    Args:
        case: The fuzzed input.
        number: Number of the case, which selects merge method and format.
    """
    path, folder = case.path, case.path.parent
    method, format = list(METHODS)[number % len(METHODS)], list(FORMATS)[number % len(FORMATS)]
    if case.kind in ("lora", "folder"):
        yield "load", lambda: load(path)
        yield "summarise", lambda: summarise(path)
        yield "merge", lambda: _merged(path, method, None)
        yield "convert", lambda: _saved(path, format, folder)
        yield "merge converted", lambda: _merged(path, "svd", 4)
        yield "open on a cluster", lambda: RemoteInputs.of([load(path)], [path], [None], None).open()
    elif case.kind == "gates":
        yield "load gates", lambda: TrainedGates.load(path).gates.copy()
    elif case.kind == "statistics":
        yield "merge with statistics", lambda: _calibrated(path)
    elif case.kind == "state":
        yield "resume", lambda: _resumed(path)
    elif case.kind == "texts":
        yield "read examples", lambda: "".join(map(str, read_texts(path))).encode()
    elif case.kind == "model":
        yield "load a model", lambda: load_model(path)
    else:
        yield "read the recipe", lambda: recipe_to_text(read_recipe(path))
        yield "run", lambda: run(read_recipe(path), folder=folder, find_cached=cached_folder)
    if case.kind in ("lora", "folder", "gates", "recipe"):
        # one of the options per case, because the command line is slow
        yield (
            "inspect",
            lambda: _command("inspect", str(path), *[[], ["--json"], ["--modules"], ["--recipe"]][number % 4]),
        )


def _merged(path: Path, method: str, convert_rank: int | None) -> object:
    other = path.parent / "sound.safetensors"
    first = summarise(path).format
    other.write_bytes(sound(first).to_bytes())
    rank = {} if method in ("concat", "linear") else {"rank": 2}
    entries = [Input(path=path.name), Input(path=other.name, weight=-0.5)]
    recipe = Recipe(method=method if method != "calibrated" else "lego", settings=rank, inputs=entries,
                    convert_rank=convert_rank)  # fmt: skip
    result = run(recipe, folder=path.parent, key_map=key_map, rename_for_format=rename_for_format)
    written = save(result.adapter, path.parent / "merged", dtype=torch.float32)
    read = load(written)  # raises if the written file is invalid
    if set(read.modules) != set(result.adapter.modules):
        raise Defect(f"{len(result.adapter.modules)} modules written, {len(read.modules)} read")
    return read


def _saved(path: Path, format: str, folder: Path) -> object:
    adapter = load(path, convert_rank=4)
    return load(save(rename_for_format(adapter, format), folder / "saved", format=format))


def _calibrated(path: Path) -> object:
    for name, seed in (("a", 1), ("b", 2)):
        (path.parent / f"{name}.safetensors").write_bytes(sound("kohya", seed=seed).to_bytes())
    Statistics.load(path)
    entries = [Input(path=f"{name}.safetensors") for name in "ab"]
    recipe = Recipe(method="calibrated", settings={"rank": 2, "statistics": path.name}, inputs=entries)
    return run(recipe, folder=path.parent)


def _resumed(folder: Path) -> object:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.AdamW([p])
    record = FitRecord()
    steps = resume_state(folder, "k", [p], optimizer, record)
    p.grad = torch.ones(3)
    optimizer.step()
    return steps, sum(record.losses), sum(record.entropies)


def _command(*arguments: str) -> None:
    result = CliRunner().invoke(app, list(arguments))
    if result.exit_code not in (0, 2, 3, 4) or (result.exception and not isinstance(result.exception, SystemExit)):
        raise Defect(f"exit code {result.exit_code}: {result.output[-1500:]}") from result.exception


def outcome(read: Callable[[], object]) -> str:
    """Run a reading; return ``ok`` or ``refused``, and raise any other error."""
    try:
        read()
    except LegoMoleError as error:
        if len(str(error)) > 20_000:
            raise Defect(f"an error of {len(str(error))} characters") from None
        return "refused"
    return "ok"
