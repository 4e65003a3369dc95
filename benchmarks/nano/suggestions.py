"""Suggested strengths and the sweep against the pictures, for every pair of a subject LoRA and a style LoRA.

All rows are shares of right joint pictures (see `scoring`). Rows are logged, so that an interrupted run resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.concat import Concat
from legomole.core.recipes.method_settings import build_method, takes_statistics
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.suggest import suggest
from legomole.core.recipes.sweep import PICTURES, Candidate, Sweep, sweep

from ..common import mean, write
from . import spikes
from .evaluate import TUNING, Bench, LoraKey
from .joint_rows import Rows
from .methods import LoraSet, light_statistics
from .report import spread

SUBJECTS, STYLES = ("heart", "bolt", "fish", "house"), ("ember", "shadow", "wood")
PAIRS: tuple[LoraKey, ...] = tuple(
    ((subject, style), seed) for seed in (0, 1, 2) for subject in SUBJECTS for style in STYLES
)
SETS = (*TUNING, *(key for key in PAIRS if key not in TUNING))
"""All sets, those first on which the rules were chosen."""

Result = dict[str, Any]


def recipe_of(loras: LoraSet) -> Recipe:
    return Recipe(method="concat", inputs=[Input(path=concept) for concept in loras.concepts])


def swept(loras: LoraSet) -> Sweep:
    """The sweep of a set at strength 1."""
    return sweep(recipe_of(loras), loras.adapters, loras.cached(light_statistics))


def suggested(loras: LoraSet, *, measured: bool) -> tuple[float, ...]:
    """Suggested strengths for the exact sum, from the weights alone or also from what is measured on the model."""
    statistics = loras.cached(light_statistics) if measured else None
    return suggest(recipe_of(loras), loras.adapters, statistics=statistics, choose_method=False).weights


class _Measured:
    """The merges of one set and their scores."""

    def __init__(self, rows: Rows, key: LoraKey) -> None:
        self.rows, self.key, self.loras = rows, key, rows.bench.loras(*key)
        self._merges: dict[tuple[str, str], Adapter] = {}

    def candidate(self, candidate: Candidate, place: int) -> dict[str, Any]:
        """The score of a candidate at a place of the sweep, with its errors: alone, joint and base."""
        name = f"{candidate.label} x {candidate.strength:g}"
        score = self.rows.score(self.key, name, lambda: self._merged(candidate), candidate.strength)
        errors = candidate.prediction
        return {
            **{"merge": candidate.label, "strength": candidate.strength, "joint": score, "place": place},
            **{"alone": _rounded(errors.alone), "predicted": _rounded((errors.joint, errors.base))},
        }

    def _merged(self, candidate: Candidate) -> Adapter:
        """The merge of a candidate at strength 1."""
        key = candidate.method, candidate.rank
        if key not in self._merges:
            settings: dict[str, Any] = {"rank": candidate.rank} if candidate.rank else {}
            statistics = {"statistics": self.loras.cached(light_statistics)}
            settings |= statistics if takes_statistics(candidate.method) else {}
            method = build_method(candidate.method, settings)
            self._merges[key] = merge(self.loras.adapters, method, dtype=torch.float32).adapter
        return self._merges[key]

    def suggestion(self, *, measured: bool) -> dict[str, Any]:
        """The score of the exact sum at suggested strengths."""
        weights = suggested(self.loras, measured=measured)
        even = len(set(weights)) == 1  # then it may be a candidate of the sweep, whose row serves
        name = f"concat x {weights[0]:g}" if even else f"sum at {', '.join(f'{weight:g}' for weight in weights)}"

        def summed() -> Adapter:
            return merge(self.loras.adapters, Concat(), weights, dtype=torch.float32).adapter

        return {"weights": weights, "joint": self.rows.score(self.key, name, summed, 1.0)}


def measure(bench: Bench, log: Path, sets: Sequence[LoraKey] = SETS, *, all_methods: bool = True) -> list[Result]:
    """Measure the suggested strengths and the candidates of the sweep on all sets.

    Args:
        bench: The models. log: File of the rows.
        sets: The LoRAs. all_methods: Measure all candidates, not only those of the exact sum.

    Returns:
        Per set the scores of the candidates with their places and predictions, and those of the suggestions with their
        strengths.
    """
    rows = Rows(bench, log)
    results: list[Result] = []
    for key in sets:
        measured = _Measured(rows, key)
        places = {candidate: place for place, candidate in enumerate(swept(measured.loras).candidates)}
        ordered = sorted(places, key=lambda candidate: (candidate.label, candidate.strength))
        chosen = [candidate for candidate in ordered if all_methods or candidate.method == "concat"]
        results.append(
            {
                **{"concepts": key[0], "seed": key[1], "tuning": key in TUNING},
                "candidates": [measured.candidate(candidate, places[candidate]) for candidate in chosen],
                "weights": measured.suggestion(measured=False),
                "account": measured.suggestion(measured=True),
            }
        )
    return results


def _rounded(errors: Sequence[float | None]) -> list[float | None]:
    return [None if error is None else round(error, 3) for error in errors]


@dataclass(frozen=True)
class _Value:
    """A score of a set, for `spread`."""

    concepts: tuple[str, ...]
    seed: int
    joint: float


def table(results: Sequence[Result]) -> str:
    """Return a Markdown table: the exact sum at 1, at the suggestions and at the best strength; and the sweep.

    Gain is the difference to the sum at strength 1, on the same sets; way is the gain as a share of the best row's.
    """
    complete = [row for row in results if len(_merges(row)) > 1]
    lines = ["| | sets | joint | gain | way |", "|---|---|---|---|---|"]
    parts = (
        (results, {
            "sum, strength 1": lambda row: _at(row, 1.0),
            "sum, suggested from the weights": lambda row: row["weights"]["joint"],
            "sum, suggested from the account": lambda row: row["account"]["joint"],
            "sum, the best of four strengths": lambda row: max(c["joint"] for c in _of_sum(row)),
        }),
        (complete, {
            "sweep: the sum at strength 1": lambda row: _at(row, 1.0),
            "sweep: the first": lambda row: min(row["candidates"], key=lambda c: c["place"])["joint"],
            "sweep: the best of the first six": lambda row: max(c["joint"] for c in _six(row)),
            "sweep: the best of all 14": lambda row: max(c["joint"] for c in row["candidates"]),
        }),
    )  # fmt: skip
    for rows, columns in parts:
        scores = {name: [float(score(row)) for row in rows] for name, score in columns.items()}
        first, best = next(iter(scores.values())), list(scores.values())[-1]
        whole = mean(best) - mean(first)
        for name, values in scores.items():
            gains = [value - start for value, start in zip(values, first, strict=True)]
            way = f"{mean(gains) / whole:.0%}" if whole and name not in (next(iter(scores)),) else ""
            lines.append(
                f"| {name} | {len(rows)} | {mean(values):.2f} ±{_spread(rows, values):.2f} | "
                f"{mean(gains):+.2f} ±{_spread(rows, gains):.2f} | {way} |"
            )
    return "\n".join(lines)


def _merges(row: Result) -> set[str]:
    return {candidate["merge"] for candidate in row["candidates"]}


def _of_sum(row: Result) -> list[dict[str, Any]]:
    return [candidate for candidate in row["candidates"] if candidate["merge"] == "concat"]


def _at(row: Result, strength: float) -> float:
    return next(candidate["joint"] for candidate in _of_sum(row) if candidate["strength"] == strength)


def _six(row: Result) -> list[dict[str, Any]]:
    """The candidates that get a picture, see `Sweep.best`."""
    chosen: list[dict[str, Any]] = []
    for candidate in sorted(row["candidates"], key=lambda c: c["place"]):
        if sum(other["merge"] == candidate["merge"] for other in chosen) < 2 and len(chosen) < PICTURES:
            chosen.append(candidate)
    return chosen


def _spread(rows: Sequence[Result], values: Sequence[float]) -> float:
    return spread(
        [_Value(tuple(row["concepts"]), row["seed"], value) for row, value in zip(rows, values, strict=True)], "joint"
    )


def publish(results: Sequence[Result], spiked: Sequence[Result], out: Path) -> None:
    """Write ``suggestions.json`` and ``suggestions.md``: all sets, those without the tuning sets, and the spikes."""
    write(out / "suggestions.json", {"sets": results, "spikes": spiked})
    others = [row for row in results if not row["tuning"]]
    parts = ["**All sets**", table(results), "**Without the tuning sets**", table(others), "**Spikes**"]
    write(out / "suggestions.md", "\n\n".join([*parts, spikes.table(spiked)]))
