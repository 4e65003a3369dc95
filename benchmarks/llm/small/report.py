"""Write the comparison to files: ``results.json`` and ``table.md``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ...common import mean, write
from . import texts
from .evaluate import Bench, Plan, Row, run, spread

GATES = ("mole sigmoid", "mole softmax", "mole 4 shown", "mole no others", "mole balance", "mole block", "mole layer",
         "mole matrix", "mole experts", "mole token", "mole token block", "mole-paper")  # fmt: skip
PLANS = {"gates": Plan(("mole", *GATES), (("rotate", "language B", "next letter"),))}
ENCODER = {
    "four": Plan(
        ("base", "sum", "average", "svd", "ties", "knots", "peft ties", "lego", "lego-paper", "lego calibrated",
         "calibrated", "mole", "mole layer"),
        (tuple(texts.TASKS),),
        scales=(0.5, 0.7, 1.0, 1.4),
    )
}  # fmt: skip
METRICS: dict[str, Callable[[Row], float]] = {
    "new": lambda r: r.new,
    "tokens": lambda r: mean(r.parts),
    "worst": lambda r: r.worst,
    "kept": lambda r: mean(r.kept),
    "base": lambda r: r.base,
    "mixture": lambda r: r.mixture,
}


def publish(rows: dict[str, list[Row]], out: Path, prefix: str = "") -> None:
    """Write results and tables; `rows` holds the rows of every plan by its title, `prefix` starts the file names."""
    write(out / f"{prefix}results.json", {name: [_plain(row) for row in part] for name, part in rows.items()})
    tables = [table(name, part) for name, part in rows.items()]
    tables += [each(name, part) for name, part in rows.items() if len({row.tasks for row in part}) == 1]
    write(out / f"{prefix}table.md", "\n\n".join(tables))


def adapters_of(plans: dict[str, Plan]) -> list[tuple[int, str]]:
    """Return seed and task of every adapter that the plans need."""
    needed = [(seed, task) for plan in plans.values() for seed in plan.seeds for tasks in plan.sets for task in tasks]
    return list(dict.fromkeys(needed))


def measured(bench: Bench, plans: dict[str, Plan]) -> dict[str, list[Row]]:
    return {name: run(bench, plan) for name, plan in plans.items()}


def _plain(row: Row) -> dict[str, Any]:
    result = asdict(row)
    result |= {key: [round(x, 4) for x in result[key]] for key in ("right", "parts", "kept")}
    return result | {key: round(result[key], 4) for key in ("base", "mixture", "seconds")}


def table(name: str, rows: Sequence[Row]) -> str:
    """Return a Markdown table of means over sets and seeds, with the standard deviation over several seeds."""
    sets, seeds = len({row.tasks for row in rows}), len({row.seed for row in rows})
    lines = [f"**{name}: {rows[0].n} adapters, {sets} sets x {seeds} seeds**", "",
             f"| method | rank | strength | {' | '.join(METRICS)} |",
             f"|---|---|---|{'---|' * len(METRICS)}"]  # fmt: skip
    for method in dict.fromkeys(row.method for row in rows):
        part = [row for row in rows if row.method == method]
        cells = [_cell(part, of) for of in METRICS.values()]
        lines.append(f"| {method} | {part[0].rank} | {part[0].scale:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row], metric: Callable[[Row], float]) -> str:
    deviation = spread(rows, metric)
    return f"{mean([metric(row) for row in rows]):.2f}" + ("" if deviation is None else f" ±{deviation:.2f}")


def each(name: str, rows: Sequence[Row]) -> str:
    """Return a Markdown table of the share of each adapter's accuracy that a method keeps, as means over seeds."""
    tasks = rows[0].tasks
    lines = [f"**{name}: kept of each adapter's accuracy alone**", "",
             f"| method | {' | '.join(tasks)} |", f"|---|{'---|' * len(tasks)}"]  # fmt: skip
    for method in dict.fromkeys(row.method for row in rows):
        part = [row for row in rows if row.method == method]
        cells = [f"{mean([row.kept[i] for row in part]):.2f}" for i in range(len(tasks))]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)
