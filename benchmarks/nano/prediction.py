"""How well the account of a merge predicts scores: rank correlations over methods and sets of LoRAs, at strength 1."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from legomole.core.merge.account import Prediction
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.concat import Concat
from scipy.stats import spearmanr

from ..common import mean
from .evaluate import Bench, Row
from .methods import light_statistics

_ROW_OF = {"sum": "sum", "svd": "svd", "lego": "lego", "lego calibrated": "one-step", "ssr": "ssr"}
"""Method of an account -> method of the table."""


def correlations(bench: Bench) -> dict[str, Any]:
    """Correlate predicted errors with the scores of all measured rows of these methods at strength 1.

    Returns:
        Per column Spearman's rho of minus the predicted error and the score, over all rows, and the mean over sets of
        rho over the methods of one set; and the numbers of rows and sets.
    """
    by_set: dict[tuple[tuple[str, ...], int], list[Row]] = {}
    for row in bench.rows.values():
        if row.scale == 1.0 and row.n == 2 and row.method in _ROW_OF.values():
            by_set.setdefault((row.concepts, row.seed), []).append(row)
    points: dict[str, list[list[tuple[float, float]]]] = {"alone": [], "joint": [], "base": []}
    for (concepts, seed), rows in sorted(by_set.items()):
        if len(rows) < len(_ROW_OF):
            continue
        loras = bench.loras(concepts, seed)
        statistics = loras.cached(light_statistics)
        report = merge(loras.adapters, Concat(), dtype=torch.float32, statistics=statistics).report
        predicted = {_ROW_OF[p.method]: p for p in report.predicted if p.method in _ROW_OF}
        for column, own in points.items():
            own.append([_point(column, predicted[row.method], row) for row in rows])
    return {
        "rows": sum(map(len, points["joint"])),
        "sets": len(points["joint"]),
        **{column: round(_rho([p for part in parts for p in part]), 3) for column, parts in points.items()},
        **{f"{column} within sets": round(mean([_rho(p) for p in parts if _varies(p)]), 3)
           for column, parts in points.items()},
    }  # fmt: skip


def _point(column: str, predicted: Prediction, row: Row) -> tuple[float, float]:
    if column == "alone":
        errors = [error for error in predicted.alone if error is not None]
        return -mean(errors), (row.subject + row.style) / 2
    return -float(getattr(predicted, column)), float(getattr(row, column))


def _varies(points: Sequence[tuple[float, float]]) -> bool:
    return len({score for _, score in points}) > 1


def _rho(points: Sequence[tuple[float, float]]) -> float:
    return float(spearmanr([p for p, _ in points], [s for _, s in points])[0])
