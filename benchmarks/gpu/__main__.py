"""``python -m benchmarks.gpu``, from the project's root: merging, calibration, gate training and mixing on a GPU.

Needs only torch and this package. Takes less than eight minutes; a run that was interrupted goes on with the next part.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from legomole.core import __version__

from ..common import write
from .device import describe
from .parts import PARTS, Run

_HERE = Path(__file__).parent


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--size", choices=["full", "small"], default="full")
    parser.add_argument("--rounds", type=int, default=5, help="timed calls; the median counts")
    parser.add_argument("--again", action="store_true", help="run parts again that have results")
    parser.add_argument("--out", type=Path, default=_HERE, help="folder for results.json")
    options = parser.parse_args(arguments)
    run = Run(torch.device(options.device), options.size, options.rounds)
    path = options.out / "results.json"
    results = _load(path, run)
    for name in options.parts:
        if name in results["parts"] and not options.again:
            print(f"{name}: has results in {path}", flush=True)
            continue
        start = time.perf_counter()
        rows: list[dict[str, Any]] = []
        for row in PARTS[name](run):
            rows.append(row)
            print(f"{name}: {_text(row)}", flush=True)
        results["parts"][name] = {"seconds": round(time.perf_counter() - start, 1), "rows": rows}
        write(path, results)


def _load(path: Path, run: Run) -> dict[str, Any]:
    """Return the results of earlier parts, or none if they are of another device, size or version."""
    header = {"device": describe(run.device), "size": run.size, "legomole": __version__}
    if path.exists():
        stored = json.loads(path.read_text())
        if all(stored[key] == value for key, value in header.items()):
            return stored
    rates = {"bandwidth_gb_per_s": run.bandwidth / 1e9, "bfloat16_tflop_per_s": run.matmul_rate / 1e12}
    return {**header, **rates, "parts": {}}


def _text(row: dict[str, Any]) -> str:
    texts = (f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values())
    return ", ".join(f"{key} {text}" for key, text in zip(row, texts, strict=True))


if __name__ == "__main__":
    main()
