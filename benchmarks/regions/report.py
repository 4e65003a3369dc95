"""Write the results: ``results.json``, ``table.md`` and the contact sheet ``sheet.png``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from legomole.core.pictures.canvas import Canvas
from legomole.nano.demo import tile
from PIL import Image

from ..common import Say, mean, write
from ..nano.report import cell
from .evaluate import PAIRS, Bench, Row, base_scenes, both_scenes, run, seconds_per_step
from .methods import METHODS, Request
from .scoring import judged, sampled
from .store import RegionStore
from .train import SEEDS

_METRICS = ("right_place", "halves", "other", "bleeding", "base")


def evaluate(store: RegionStore, out: Path, say: Say) -> None:
    """Measure what is missing in ``out/rows.jsonl``, time the methods and write all files."""
    bench = Bench(store, out / "rows.jsonl", say)
    run(bench)
    publish(bench, seconds_per_step(bench), out)
    sheet(bench).save(out / "sheet.png", optimize=True)


def publish(bench: Bench, seconds: dict[str, float], out: Path) -> None:
    """Write ``results.json`` and ``table.md``; `seconds` per step, by method."""
    rows = [bench.rows[name, pair, seed] for name in METHODS for pair in PAIRS for seed in SEEDS]
    measured = [
        {"method": row.method, "pair": "+".join(row.pair), "seed": row.seed, **_scores(row),
         "relative": _relative(bench, row), "seconds_per_step": round(seconds[row.method], 5)}
        for row in rows
    ]  # fmt: skip
    others = [row for row in bench.rows.values() if row.method not in METHODS]
    bounds = [{"method": r.method, "subject": "+".join(r.pair), "seed": r.seed, **_scores(r)} for r in others]
    write(out / "results.json", {"rows": measured, "bounds": bounds})
    write(out / "table.md", table(bench, seconds))


def _scores(row: Row) -> dict[str, Any]:
    return {metric: round(getattr(row, metric), 4) for metric in _METRICS}


def _relative(bench: Bench, row: Row) -> float | None:
    """Share of right halves, relative to that of each LoRA alone; `None` if these show nothing."""
    alone = bench.alone_halves(row.pair, row.seed)
    return round(row.halves / alone, 4) if alone else None


def table(bench: Bench, seconds: dict[str, float]) -> str:
    """Return a Markdown table of means over pairs and seeds with 95% intervals, see `nano.report.spread`."""
    lines = [f"**{len(PAIRS)} pairs x {len(SEEDS)} seeds**", "",
             "| method | right place | right halves | relative | other | bleeding | base | ms per step | to gates |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    for name in METHODS:
        rows = [bench.rows[name, pair, seed] for pair in PAIRS for seed in SEEDS]
        right, halves, other, bleeding, base = (cell(rows, metric) for metric in _METRICS)
        relative = mean([row.halves for row in rows]) / mean([bench.alone_halves(r.pair, r.seed) for r in rows])
        step = f"{1000 * seconds[name]:.1f} | {seconds[name] / seconds['gates']:.2f}"
        lines.append(f"| {name} | {right} | {halves} | {relative:.2f} | {other} | {bleeding} | {base} | {step} |")
    alone = [row for row in bench.rows.values() if row.method.startswith("alone")]
    base_rows = [row for row in bench.rows.values() if row.method == "base"]
    lines += [
        "",
        f"Each LoRA alone shows its subject in its half in {mean([r.halves for r in alone]):.2f} of the pictures, also "
        f"in the other half in {mean([r.other for r in alone]):.2f}, where the base subject is right in "
        f"{mean([r.base for r in alone]):.2f}. The base model shows both base subjects in their place in "
        f"{mean([r.right_place for r in base_rows]):.2f}; its `base` is {mean([r.base for r in base_rows]):.2f}.",
    ]
    return "\n".join(lines)


def sheet(bench: Bench, pair: tuple[str, str] = PAIRS[0]) -> Image.Image:
    """Draw a contact sheet: a row per method, with four pictures of both subjects and three of base subjects."""
    loras = bench.loras(pair, 0)
    scenes = (*both_scenes(loras.concepts, 4, 0), *base_scenes(3, 0))
    request, cell, left, top = Request(scenes, bench.short), 64, 90, 40
    canvas = Canvas(density=1)
    for j, scene in enumerate(scenes):
        for line, text in enumerate((f"{scene.left} | {scene.right}", scene.style)):
            canvas.text(left + (2 * cell + 6) * j + 2, 4 + 14 * line, text, size=11)
    for i, name in enumerate(METHODS):
        with METHODS[name](loras, request) as model:
            pictures = sampled(bench.store, model, request, 7)
        right = judged(bench.store, pictures).subject_right(scenes)
        y = top + (cell + 16) * i
        canvas.text(6, y + 24, name, size=13)
        for j, picture in enumerate(pictures):
            for side, half in enumerate(picture.chunk(2, dim=2)):
                x = left + (2 * cell + 6) * j + cell * side
                canvas.image(x, y, tile(half, cell))
                canvas.box(x + 2, y + cell + 2, cell - 4, 4, (30, 120, 60) if right[j, side] else (190, 40, 50))
    return canvas.finish(left + (2 * cell + 6) * len(scenes), top + (cell + 16) * len(METHODS))
