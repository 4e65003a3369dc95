"""Write the comparison to files: ``results.json``, ``table.md`` and a contact sheet."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from legomole.core.pictures.canvas import Canvas
from legomole.nano.demo import tile
from PIL import Image

from ..common import Say, write
from ..nano.report import cell
from .data import Pair
from .evaluate import ALONE, METHOD_NAMES, PAIRS, TRAINED, TUNING, Bench, Row, run
from .model import ArtStore
from .scoring import Amount, task
from .two import TwoBench, TwoRow
from .two import run as run_two

METRICS = ("joint", "subject", "style", "base", "tagged", "synonym", "joint_subject", "joint_style")
_HEADS = ("joint", "subject", "style", "base", "tagged", "synonym", "subject of joint", "style of joint")
TWO_METRICS = ("two", "halves", "other")
_SHEET_PAIRS: tuple[Pair, ...] = PAIRS[1:5]  # none in a style of OpenMoji, whose licence would extend to the sheet


def evaluate(store: ArtStore, out: Path, pairs: int, say: Say, processes: int = 1) -> None:
    """Run the comparison on the first `pairs` pairs. Rows in ``work/rows.jsonl`` are not measured again."""
    bench = Bench(store, store.folder / "rows.jsonl", Amount(), say)
    chosen = run(bench, PAIRS[:pairs], processes)
    scenes = TwoBench(store, store.folder / "two.jsonl", say)
    run_two(scenes, processes=processes)
    publish(bench, scenes, chosen, out)


def publish(bench: Bench, scenes: TwoBench, chosen: Mapping[str, float], out: Path) -> None:
    """Write all files from the rows measured so far, and the strengths that were chosen on the tuning pairs."""
    rows, two = list(bench.rows.values()), list(scenes.rows.values())
    scored = [_entry(row, METRICS) for row in rows if row.pair in PAIRS]
    write(out / "results.json", {
        "rows": [*scored, *(_entry(row, TWO_METRICS) for row in two)],
        "tuning": [_entry(row, METRICS) for row in rows if row.pair in TUNING],
    })  # fmt: skip
    parts = {"At strength 1": table(rows, {}), "At the strengths of the tuning pairs": table(rows, chosen),
             f"{_COMPARED} minus the others, at these strengths": differences(rows, chosen)}  # fmt: skip
    if two:
        parts["Two subjects"] = two_table(two)
    (out / "table.md").write_text("\n\n".join(f"## {title}\n\n{part}" for title, part in parts.items()) + "\n")
    sheet(bench, chosen).save(out / "sheet.jpg", quality=88, optimize=True)


def _entry(row: Row | TwoRow, metrics: Sequence[str]) -> dict[str, Any]:
    values = {metric: getattr(row, metric) for metric in metrics}
    measured = {metric: round(value, 4) for metric, value in values.items() if not math.isnan(value)}
    return {"method": row.method, "pair": "+".join(row.pair), "seed": row.seed, "n": row.n, "strength": row.strength,
            **measured}  # fmt: skip


def table(rows: Sequence[Row], strengths: Mapping[str, float]) -> str:
    """Return a Markdown table of means over pairs, with half the width of their 95% intervals, see `spread`.

    Args:
        rows: Rows of all strengths.
        strengths: Method -> strength of its line, 1 by default.
    """
    lines = [f"| method | strength | pairs | {' | '.join(_HEADS)} |", "|---|---|---|" + "---|" * len(_HEADS)]
    for method in (*ALONE, *METHOD_NAMES, *TRAINED):
        strength = strengths.get(method, 1.0)
        part = [r for r in rows if r.method == method and r.strength == strength and r.pair in PAIRS]
        if part:
            cells = " | ".join(
                cell([r for r in part if not math.isnan(getattr(r, metric))], metric) for metric in METRICS
            )
            lines.append(f"| {method} | {strength:g} | {len(part)} | {cells} |")
    return "\n".join(lines)


_COMPARED = "one-step"


def differences(rows: Sequence[Row], strengths: Mapping[str, float], compared: str = _COMPARED) -> str:
    """Return a Markdown table: a method's scores minus those of each other one on the same pairs, as in `table`."""
    at = {(r.method, r.pair): r for r in rows if r.strength == strengths.get(r.method, 1.0) and r.pair in PAIRS}
    lines = [f"| method | pairs | {' | '.join(_HEADS)} |", "|---|---|" + "---|" * len(_HEADS)]
    for method in (*METHOD_NAMES, *TRAINED):
        both = [(at[compared, p], at[method, p]) for p in PAIRS if {(compared, p), (method, p)} <= {*at}]
        if both and method != compared:
            part = [replace(a, **{m: getattr(a, m) - getattr(b, m) for m in METRICS}) for a, b in both]
            lines.append(f"| {method} | {len(part)} | {' | '.join(cell(part, metric) for metric in METRICS)} |")
    return "\n".join(lines)


def two_table(rows: Sequence[TwoRow]) -> str:
    """Return a Markdown table of the scores of two subjects."""
    lines = ["| method | pairs | both in place | halves | the other's subject |", "|---|---|---|---|---|"]
    for method in dict.fromkeys(row.method for row in rows):
        part = [row for row in rows if row.method == method]
        lines.append(f"| {method} | {len(part)} | {' | '.join(cell(part, metric) for metric in TWO_METRICS)} |")
    return "\n".join(lines)


_SHOWN = ("base", *ALONE, "sum", "svd", "ties", "lego-paper", "lego", "one-step", "ssr", "k-lora", "router")


def sheet(bench: Bench, strengths: Mapping[str, float], pairs: Sequence[Pair] = _SHEET_PAIRS) -> Image.Image:
    """Draw a contact sheet: a row per method, and for each pair two pictures of both, then one of each other kind."""
    cell, left, top = 66, 110, 34
    few = {pair: task(pair, Amount(2, 1, 1, 1)) for pair in pairs}
    columns = [(pair, i) for pair, scored in few.items() for i in range(len(scored.kinds))]
    canvas = Canvas(density=1)
    for j, (pair, i) in enumerate(columns):
        scored = few[pair]
        for line, text in enumerate(scored.wanted[i]):
            canvas.text(left + cell * j + 2, 4 + 13 * line, text, size=10)
    for row, name in enumerate(_SHOWN):
        canvas.text(4, top + cell * row + 26, name, size=12)
        for pair, scored in few.items():
            score = bench.score(name, pair, strengths.get(name, 1.0), scored)
            for i, picture in enumerate(score.pictures):
                j = columns.index((pair, i))
                canvas.image(left + cell * j, top + cell * row, tile(picture, cell - 2))
    return canvas.finish(left + cell * len(columns), top + cell * len(_SHOWN)).convert("RGB")
