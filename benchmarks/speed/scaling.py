"""Time of a LEGO merge by size: `python -m benchmarks.speed.scaling`, from the project's root; two minutes.

Random LoRAs with SDXL's layers. Starting from 3 LoRAs, rank 16 and all 722 layers, one of these is varied at a time.
Reading, merging and writing are counted; the fastest of three runs counts. Writes ``scaling.json`` and ``scaling.png``.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from ..common import write
from .cases import Case
from .memory import sdxl_layers
from .sampled import fastest
from .whole import WHOLE

CURVES = {"LoRAs": (2, 3, 4, 6, 8, 12), "rank": (4, 8, 16, 32, 64), "layers": (90, 180, 361, 722)}


def cases(curve: str, values: Sequence[int]) -> Iterator[Case]:
    layers = list(sdxl_layers())
    default = Case("scaling", layers, 3, 16)
    for value in values:
        name = f"{curve}-{value}"
        if curve == "LoRAs":
            yield replace(default, name=name, n=value)
        elif curve == "rank":
            yield replace(default, name=name, rank=value)
        else:  # every n-th layer, so that all shapes remain
            yield replace(default, name=name, layers=layers[:: len(layers) // value][:value])


def seconds(case: Case, folder: Path, rounds: int) -> float:
    paths = case.write(folder)
    best = fastest(lambda: WHOLE["legomole-lego"](case, paths, folder / "out.safetensors"), rounds)
    for path in paths:
        path.unlink()
    return best


def draw(curves: dict[str, dict[int, float]], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3), layout="constrained")
    panels = figure.subplots(1, len(curves), sharey=True, squeeze=False)[0]
    for axes, (curve, points) in zip(panels, curves.items(), strict=True):
        axes.plot(list(points), list(points.values()), marker="o")
        axes.set(xlabel=curve, xscale="log", yscale="log")
        axes.set_xticks(list(points), [str(value) for value in points])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("seconds, load + LEGO + save")
    figure.savefig(path, dpi=110)


def main(arguments: Sequence[str] | None = None, values: Mapping[str, Sequence[int]] = CURVES) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    options = parser.parse_args(arguments)
    curves: dict[str, dict[int, float]] = {}
    with tempfile.TemporaryDirectory() as folder, torch.no_grad():
        for curve, numbers in values.items():
            curves[curve] = {}
            for value, case in zip(numbers, cases(curve, numbers), strict=True):
                curves[curve][value] = round(seconds(case, Path(folder), options.rounds), 3)
                print(f"{curve} {value}: {curves[curve][value]} s", flush=True)
    write(options.out / "scaling.json", curves)
    draw(curves, options.out / "scaling.png")


if __name__ == "__main__":
    main()
