"""Write the comparison to files: ``results.json``, ``table.md`` and a plot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..common import ResultLog, mean, write
from .evaluate import ROWS

_SCORES = ("normalised", "worst", "held_out", "base")


@dataclass(frozen=True)
class Row:
    """Result of one method on one set of adapters.

    Args:
        method: Name of the method. n: Number of adapters. seed: Their seed.
        rank: Rank of the result, ``"-"`` if it is no adapter. strength: Strength.
        normalised: Mean over the tasks of accuracy divided by that of the adapter alone.
        worst: The lowest of these.
        held_out: Accuracy on tasks that no adapter was trained on.
        base: Perplexity of the base model on news, divided by this model's; 1 if its ability is untouched. Both are
            ``None`` for adapters alone that were not measured there.
        needs_data: What the method looks at beside the adapters.
        accuracies: Accuracy on each task.
    """

    method: str
    n: int
    seed: int
    rank: str
    strength: float
    normalised: float
    worst: float
    held_out: float | None
    base: float | None
    needs_data: str
    accuracies: dict[str, float]


def rows(log: ResultLog) -> list[Row]:
    """All rows whose results are in the log; for a method that was measured at several strengths the last one."""
    results = [(result["key"], result) for result in log.read()]
    alone = {(key["task"], key["seed"]): result for key, result in results if key["what"] == "alone"}
    elsewhere = {(key["task"], key["seed"]): result for key, result in results if key["what"] == "elsewhere"}
    bases = [result for key, result in results if key["what"] == "base"]
    if not bases:
        return []
    base = bases[-1]
    base_accuracies = {task: right for each in bases for task, right in each["accuracies"].items()}
    found: dict[tuple[int, str, int], Row] = {}

    def add(method: str, tasks: list[str], seed: int, strength: float, accuracies: list[float], scores: Any) -> None:
        reference = [alone[task, seed]["accuracy"] for task in tasks]
        kept = [right / alone for right, alone in zip(accuracies, reference, strict=True)]
        known = ROWS.get(method)
        rank, data = (known.rank, known.data) if known else ("-", "the task" if method == "alone" else "")
        found[len(tasks), method, seed] = Row(
            method, len(tasks), seed, rank, strength, mean(kept), min(kept), scores and scores["held_out"],
            scores and base["perplexity"] / scores["perplexity"], data, dict(zip(tasks, accuracies, strict=True)),
        )  # fmt: skip

    for key, result in results:
        if key["what"] != "test" or any((task, key["seed"]) not in alone for task in key["tasks"].split(",")):
            continue
        tasks, seed = key["tasks"].split(","), key["seed"]
        each = [elsewhere.get((task, seed)) for task in tasks]
        means = (
            {score: mean([one[score] for one in each]) for score in ("held_out", "perplexity")} if all(each) else None
        )
        add("alone", tasks, seed, 1.0, [alone[task, seed]["accuracy"] for task in tasks], means)
        add("base", tasks, seed, 0.0, [base_accuracies[task] for task in tasks], base)
        add(key["method"], tasks, seed, key["strength"], result["accuracies"], result)
    order = ["alone", "base", *ROWS]
    return sorted(found.values(), key=lambda row: (-row.n, order.index(row.method), row.seed))


def publish(log: ResultLog, out: Path) -> None:
    """Write all files from the rows in the log."""
    measured = rows(log)
    write(out / "results.json", {"rows": [_rounded(row) for row in measured]})
    counts = dict.fromkeys(row.n for row in measured)
    write(out / "table.md", "\n\n".join(table([row for row in measured if row.n == n]) for n in counts))
    if measured:
        plot([row for row in measured if row.n == max(counts)], out / "normalised_and_held_out.png")


def _rounded(row: Row) -> dict[str, Any]:
    values = {key: round(value, 4) if isinstance(value, float) else value for key, value in asdict(row).items()}
    return values | {"accuracies": {task: round(value, 4) for task, value in row.accuracies.items()}}


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of means over the seeds, the best first."""
    by_method = {
        method: [row for row in rows if row.method == method] for method in dict.fromkeys(r.method for r in rows)
    }
    seeds = sorted({row.seed for row in rows})
    tasks = ", ".join(rows[0].accuracies)
    lines = [f"**{rows[0].n} adapters, seeds {', '.join(map(str, seeds))}** ({tasks})", "",
             "| method | rank | needs | strength | accuracy | normalised | worst | held out | base | seeds |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for method, part in sorted(by_method.items(), key=lambda item: -mean([row.normalised for row in item[1]])):
        accuracy = mean([mean(list(row.accuracies.values())) for row in part])
        cells = " | ".join([f"{accuracy:.3f}", *(_cell(part, name) for name in _SCORES)])
        first = part[0]
        lines.append(f"| {method} | {first.rank} | {first.needs_data} | {first.strength:g} | {cells} | {len(part)} |")
    return "\n".join(lines)


def _cell(rows: Sequence[Row], score: str) -> str:
    values = [getattr(row, score) for row in rows]
    return "" if None in values else f"{mean(values):.3f}"


def plot(rows: Sequence[Row], path: Path) -> None:
    """Plot the normalised accuracy against that on held-out tasks, a point per method."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 6))
    for method in dict.fromkeys(row.method for row in rows):
        part = [row for row in rows if row.method == method and row.held_out is not None]
        if not part:
            continue
        x, y = mean([row.held_out or 0.0 for row in part]), mean([row.normalised for row in part])
        marker = "*" if "mole" in method else "s" if part[0].needs_data else "o"
        axis.plot(x, y, marker, color="C1" if "lego" in method else "C0", alpha=0.8)
        axis.annotate(method, (x, y), fontsize=8, xytext=(4, 3), textcoords="offset points")
    axis.set(xlabel="accuracy on held-out tasks", ylabel="accuracy / that of the adapter alone",
             title=f"{rows[0].n} adapters; circles need no data")  # fmt: skip
    figure.tight_layout()
    figure.savefig(path, dpi=100)
    plt.close(figure)
