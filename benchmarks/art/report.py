"""Write the comparison to files: ``results.json``, ``table.md`` and the contact sheet ``sheet.jpg``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from legomole.core.pictures.canvas import Canvas
from legomole.nano.demo import tile
from PIL import Image

from ..common import Say, write
from ..nano.report import cell
from .data import Pair
from .evaluate import ALONE, METHOD_NAMES, PAIRS, TRAINED, Bench, Row, run
from .methods import STRENGTHS
from .model import ArtStore
from .scoring import Amount, task

METRICS = ("joint", "subject", "style", "base", "tagged", "synonym", "joint_subject", "joint_style")
_HEADS = ("joint", "subject", "style", "base", "tagged", "synonym", "subject of joint", "style of joint")
_SHEET_PAIRS: tuple[Pair, ...] = (PAIRS[0], PAIRS[1], PAIRS[2], PAIRS[5])


def evaluate(store: ArtStore, out: Path, pairs: int, say: Say) -> None:
    """Run the comparison on the first `pairs` pairs. Rows in ``work/rows.jsonl`` are not measured again."""
    bench = Bench(store, store.folder / "rows.jsonl", Amount(), say)
    run(bench, PAIRS[:pairs])
    publish(bench, out)


def publish(bench: Bench, out: Path) -> None:
    """Write all files from the rows measured so far."""
    rows = list(bench.rows.values())
    write(out / "results.json", {"rows": [_entry(row) for row in rows]})
    (out / "table.md").write_text(table(rows) + "\n")
    sheet(bench).save(out / "sheet.jpg", quality=88, optimize=True)


def _entry(row: Row) -> dict[str, Any]:
    values = {metric: getattr(row, metric) for metric in METRICS}
    measured = {metric: round(value, 4) for metric, value in values.items() if not math.isnan(value)}
    return {"method": row.method, "pair": "+".join(row.pair), "seed": row.seed, "n": row.n, "strength": row.strength,
            **measured}  # fmt: skip


def table(rows: Sequence[Row]) -> str:
    """Return a Markdown table of means over pairs, with half the width of their 95% intervals, see `spread`."""
    lines = [f"| method | strength | pairs | {' | '.join(_HEADS)} |", "|---|---|---|" + "---|" * len(_HEADS)]
    for method in (*ALONE, *METHOD_NAMES, *TRAINED):
        strength = STRENGTHS.get(method, 1.0)
        part = [r for r in rows if r.method == method and r.strength == strength and r.pair in PAIRS]
        if part:
            cells = " | ".join(
                cell([r for r in part if not math.isnan(getattr(r, metric))], metric) for metric in METRICS
            )
            lines.append(f"| {method} | {strength:g} | {len(part)} | {cells} |")
    return "\n".join(lines)


_SHOWN = ("base", *ALONE, "sum", "svd", "ties", "lego-paper", "lego", "one-step", "ssr", "k-lora", "router")


def sheet(bench: Bench, pairs: Sequence[Pair] = _SHEET_PAIRS) -> Image.Image:
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
        strength = STRENGTHS.get(name, 1.0)
        canvas.text(4, top + cell * row + 26, name, size=12)
        for pair, scored in few.items():
            score = bench.score(name, pair, strength, scored)
            for i, picture in enumerate(score.pictures):
                j = columns.index((pair, i))
                canvas.image(left + cell * j, top + cell * row, tile(picture, cell - 2))
    return canvas.finish(left + cell * len(columns), top + cell * len(_SHOWN)).convert("RGB")
