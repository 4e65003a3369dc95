"""Write the comparison to files: ``results.json``, ``table.md``, ``pareto.png`` and the contact sheet ``sheet.png``."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from legomole.core.formats import load
from legomole.core.pictures.canvas import Canvas
from legomole.nano.demo import tile
from legomole.nano.store import Store
from PIL import Image

from ..common import Say, mean, write
from .evaluate import LARGER, LARGER_TUNING, SCORED, TUNING, WIDE, Bench, Plan, Row, run
from .methods import METHODS
from .prediction import correlations
from .scoring import Task, task

MAIN = ("base", "sum", "normalised", "svd", "ties", "dare", "knots", "lego", "lego-paper",
        "lego calibrated", "calibrated", "calibrated 2x", "router", "mole")  # fmt: skip
ONE_FILE = ("sum", "svd", "ties", "lego", "ssr", "np", "calibrated", "lego calibrated", "one-step")
VARIANTS = ("lego 0.5x", "lego 1.5x", "lego 80%", "lego mean", "lego reweighted", "lego-paper 1.5x", "lego-paper plain",
            "calibrated lam 0.1", "calibrated lam 1", "lego calibrated 2x", "router apart", "mole mean", "mole apart",
            "mole block", "mole output", "mole-paper", "mole-paper x N")  # fmt: skip
MANY = ("sum", "svd", "ties", "lego-paper", "lego calibrated", "calibrated", "calibrated 2x", "router", "mole")

PLANS = {
    "main": Plan(MAIN, TUNING, SCORED),
    "wide": Plan(ONE_FILE, TUNING, WIDE, tagged=False),
    "variants": Plan(VARIANTS, TUNING[:1], SCORED[:2], seeds=(0,), scales=(0.8, 1.0, 1.3)),
    "three": Plan(MANY, (LARGER_TUNING[3],), (LARGER[3],), scales=(0.7, 1.0, 1.3)),
    "four": Plan(MANY, (LARGER_TUNING[4],), (LARGER[4],), scales=(0.7, 1.0, 1.3)),
}
_ALONE = ("subject alone", "style alone", "jointly trained")
METRICS = ("joint", "subject", "style", "base", "tagged", "kid")


def evaluate(store: Store, joint: Store, out: Path, say: Say) -> None:
    """Run the whole comparison. Rows already in ``out/rows.jsonl`` are not measured again.

    Args:
        store: Model and LoRAs to compare.
        joint: Store with the LoRAs trained on both concepts, if there are any.
        out: Output folder.
        say: Called with progress messages.
    """
    bench = Bench(store, out / "rows.jsonl", say)
    alone(bench, joint)
    chosen = {name: run(bench, plan) for name, plan in PLANS.items()}
    publish(bench, chosen, out)


def alone(bench: Bench, joint: Store) -> None:
    """Measure the bounds: each LoRA of the scored pairs by itself, and the LoRAs trained on both concepts."""
    store = bench.scorer.store
    for seed in PLANS["main"].seeds:
        for pair in SCORED:
            scored = task(pair, seed=seed)
            for concept, kind in zip(pair, ("subject", "style"), strict=True):
                bench.row_of_one(f"{kind} alone", pair, seed, scored, load(store.lora(concept, seed)))
            path = joint.lora("+".join(pair), seed)
            if path.exists():
                bench.row_of_one("jointly trained", pair, seed, scored, load(path))


def publish(bench: Bench, chosen: dict[str, dict[str, float]], out: Path) -> None:
    """Write all files; `chosen` holds the strengths by plan and method."""
    rows = list(bench.rows.values())
    means: list[dict[str, Any]] = []
    wide: list[dict[str, Any]] = []
    at_one: list[dict[str, Any]] = []
    for name, strengths in chosen.items():
        plan = PLANS[name]
        for method in plan.methods:
            for seed in plan.seeds:
                part = [r for r in rows if r.method == method and r.seed == seed and r.concepts in plan.scored]
                row = _row(method, [r for r in part if r.scale == strengths[method]])
                if name == "wide":
                    wide.append(row)
                if name != "wide" or method not in MAIN:
                    means.append(row)
                    at_one += [_row(method, [r for r in part if r.scale == 1.0])] if seed == 0 else []
    for method in _ALONE:
        for seed in PLANS["main"].seeds:
            part = [r for r in rows if r.method == method and r.seed == seed]
            means += [_row(method, part)] if part else []
    tuned = [r for r in rows if (r.concepts, r.seed) in TUNING]
    sweep = [_row(m, [r for r in tuned if r.method == m and r.scale == s])
             for m in dict.fromkeys((*MAIN, *ONE_FILE))
             for s in sorted({r.scale for r in tuned if r.method == m})]  # fmt: skip
    results = {"rows": means, "wide": wide, "prediction": correlations(bench), "at_strength_one": at_one}
    write(out / "results.json", {**results, "tuning": sweep})
    tables = [table(rows, name, strengths) for name, strengths in chosen.items()]
    (out / "table.md").write_text("\n\n".join(tables) + "\n")
    _pareto(sweep, out / "pareto.png")
    sheet(bench, chosen["main"]).save(out / "sheet.png", optimize=True)


def _row(method: str, rows: Sequence[Row]) -> dict[str, Any]:
    first = rows[0]
    row: dict[str, Any] = {
        "method": method, "n": first.n, "seed": first.seed, "scale": first.scale, "rank": first.rank,
        "sets": len(rows),
    }  # fmt: skip
    means = {metric: round(mean([getattr(r, metric) for r in rows]), 4) for metric in METRICS}
    return row | {metric: value for metric, value in means.items() if not math.isnan(value)}


def table(rows: Sequence[Row], name: str, chosen: dict[str, float]) -> str:
    """Return a Markdown table of means over the scored sets of all seeds, with `spread`."""
    plan = PLANS[name]
    n = len(plan.scored[0])
    lines = [f"**{name}: {n} LoRAs, {len(plan.scored)} sets x {len(plan.seeds)} seeds**", "",
             "| method | rank | strength | joint | subject | style | base | tagged | KID |",
             "|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    extra = _ALONE if name == "main" else ()
    for method in (*extra, *plan.methods):
        part = [r for r in rows if r.method == method and r.concepts in plan.scored and r.seed in plan.seeds
                and r.scale == chosen.get(method, 1.0)]  # fmt: skip
        if part:
            cells = [cell(part, m) for m in METRICS]
            lines.append(f"| {method} | {part[0].rank} | {part[0].scale:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def cell(rows: Sequence[Any], metric: str) -> str:
    """Return mean and `spread` of a metric for a table; ``-`` if it was not measured in all rows."""
    value = mean([getattr(r, metric) for r in rows])
    return "-" if math.isnan(value) else f"{value:.2f} ±{spread(rows, metric):.2f}"


def spread(rows: Sequence[Any], metric: str, times: int = 400) -> float:
    """Return half the width of the mean's 95% interval under resampling of the LoRAs.

    Args:
        rows: Results with `concepts` and `seed`, which name their LoRAs.
        metric: Attribute of the rows.
        times: Number of resamples.
    """
    draw = random.Random(0)
    loras = sorted({(c, r.seed) for r in rows for c in r.concepts})
    means: list[float] = []
    for _ in range(times):
        count = dict.fromkeys(loras, 0)
        for lora in draw.choices(loras, k=len(loras)):
            count[lora] += 1
        weights = [math.prod([count[c, r.seed] for c in r.concepts]) for r in rows]
        if sum(weights):
            means.append(sum(w * getattr(r, metric) for w, r in zip(weights, rows, strict=True)) / sum(weights))
    means.sort()
    return (means[int(0.975 * len(means))] - means[int(0.025 * len(means))]) / 2


def _pareto(sweep: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 5))
    for method in MAIN:
        line = [r for r in sweep if r["method"] == method]
        if len(line) > 1:
            keep = [(r["subject"] + r["style"] + r["base"]) / 3 for r in line]
            axes.plot(keep, [r["joint"] for r in line], "o-", label=method, markersize=3)
    axes.set(xlabel="preserved: mean of subject, style and base", ylabel="joint", title="tuning pairs, by strength")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


_SHOWN = ("base", "sum", "svd", "ties", "lego-paper", "lego", "lego calibrated", "calibrated", "router", "mole")


def sheet(bench: Bench, chosen: dict[str, float], pair: tuple[str, str] = ("heart", "ember")) -> Image.Image:
    """Draw a contact sheet: a row per method at its strength, with three pictures of each kind."""
    scored = task(pair)
    picks = [i for kind in ("joint", "subject", "style", "base")
             for i in [j for j, k in enumerate(scored.kinds) if k == kind][:3]]  # fmt: skip
    few = Task(tuple(scored.kinds[i] for i in picks), tuple(scored.wanted[i] for i in picks))
    cell, left, top = 80, 130, 40
    canvas = Canvas(density=1)
    for j, (kind, wanted) in enumerate(zip(few.kinds, few.wanted, strict=True)):
        for line, text in enumerate((kind, " ".join(wanted))):
            canvas.text(left + cell * j + 2, 4 + 14 * line, text, size=11)
    loras = bench.loras(pair, 0)
    for i, name in enumerate(_SHOWN):
        method = METHODS[name]
        with method.use(loras, chosen[name], few.texts) as model:
            score = bench.scorer.score(model, few, 7, whole=method.whole)
        for line, text in enumerate((name, f"x {chosen[name]:g}")):
            canvas.text(6, top + cell * i + 30 + 16 * line, text, size=13)
        for j, picture in enumerate(score.pictures):
            canvas.image(left + cell * j, top + cell * i, tile(picture, cell - 2))
    return canvas.finish(left + cell * len(picks), top + cell * len(_SHOWN))
