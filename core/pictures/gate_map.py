"""The picture of a mixture's gates over a sampling run: where they were open, and how that changed on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..mole.gates import entropy
from .charts import _GRID, _INK, _LINES, _PALE, _right, _sheet, _short, heat_map, stacked

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH, _LEFT, _LEGEND = 660, 52, 196  # of a picture; of the numbers left of it; of the names right of it
_ROW = 32  # a name and its numbers
_NAME = 22  # characters


def course(table: Tensor) -> tuple[Tensor, Tensor]:
    """What the gates did pass by pass.

    Args:
        table: ``(passes, scopes, N)``, see `Record.table`.

    Returns:
        Mean gate of each expert ``(passes, N)``, and entropy ``(passes,)`` in nats, as `mole.gates.entropy` of a pass.
    """
    return table.mean(1), torch.stack([entropy([one]) for one in table])


def gate_map(table: Tensor, scopes: Sequence[str], labels: Sequence[str]) -> Image:
    """Scopes x experts as a heat map of the mean over all passes; below it the course of means and of entropy.

    Args:
        table: ``(passes, scopes, N)``. scopes: Names of the rows. labels: Of the experts.
    """
    means, entropies = course(table)
    count = f"{len(table)} pass{'es' * (len(table) != 1)} of the model"
    heat = heat_map(table.mean(0), scopes, labels, f"Gates, mean over {count}")
    width, even = max(heat.width, _WIDTH), math.log(len(labels))
    ends = f": 0 when one LoRA rules, {even:.2f} when all share evenly" if even else ""
    return stacked(
        [
            heat,
            lines(
                [(label, means[:, n].tolist()) for n, label in enumerate(labels)],
                "Mean gate of each LoRA, pass by pass",
                width=width,
            ),
            lines(
                [("entropy", entropies.tolist())], f"Entropy in nats{ends}", high=even or 1.0, width=width, height=150
            ),
        ]
    )


def lines(
    series: Sequence[tuple[str, Sequence[float]]],
    title: str,
    *,
    high: float = 1.0,
    width: int = _WIDTH,
    height: int = 220,
) -> Image:
    """Lines over the passes of a model on one scale, from 0 (or the lowest) to `high` (or the highest).

    Beside it each line's name with its first and last value. Colours come again after six lines, dashed.

    Args:
        series: Names, each with its finite values, equally many.
        title: Above the chart.
        high: What the scale shows at least.
        width: Of the picture. height: Of the picture, which grows where the names need it.
    """
    count = max((len(values) for _, values in series), default=0)
    everything = [value for _, values in series for value in values]
    low, high = min([0.0, *everything]), max([high, *everything])
    high = high if high > low else low + 1.0
    picture, draw, font = _sheet(width, max(height, 44 + _ROW * len(series) + 34), title)
    left, right, top, bottom = _LEFT, width - _LEGEND, 44, picture.height - 34
    for i in range(5):
        y = bottom - (bottom - top) * i / 4
        draw.line([(left, y), (right, y)], fill=_GRID)
        _right(draw, (left - 8, y - 7), f"{low + (high - low) * i / 4:.2f}", _PALE, font)
    for n, (name, values) in enumerate(series):
        color, dashed = _LINES[n % len(_LINES)], n >= len(_LINES)
        points = [
            (left + (right - left) * i / max(1, count - 1), bottom - (bottom - top) * (value - low) / (high - low))
            for i, value in enumerate(values)
        ]
        _stroke(draw, points, color, dashed)
        y = top - 8 + _ROW * n
        _stroke(draw, [(right + 14, y + 8), (right + 34, y + 8)], color, dashed)
        draw.text((right + 40, y), _short(name, _NAME), fill=_INK, font=font)
        told = f"{values[0]:.3f}" if len(values) == 1 else f"{values[0]:.3f} to {values[-1]:.3f}"
        draw.text((right + 40, y + 14), told, fill=_PALE, font=font)
    draw.text((left, bottom + 8), "pass 1", fill=_PALE, font=font)
    if count > 1:
        _right(draw, (right, bottom + 8), f"pass {count}", _PALE, font)
    return picture


def _stroke(draw: Any, points: Sequence[tuple[float, float]], color: tuple[int, int, int], dashed: bool) -> None:
    """A line through points; of a single one, a dot."""
    if len(points) == 1:
        x, y = points[0]
        draw.ellipse([x - 3, y - 3, x + 3, y + 3], fill=color)
    elif not dashed:
        draw.line(points, fill=color, width=2, joint="curve")
    else:
        for (x0, y0), (x1, y1) in pairwise(points):
            pieces = max(1, round(math.hypot(x1 - x0, y1 - y0) / 5))
            for i in range(0, pieces, 2):
                a, b = i / pieces, min(1.0, (i + 1) / pieces)
                draw.line(
                    [(x0 + (x1 - x0) * a, y0 + (y1 - y0) * a), (x0 + (x1 - x0) * b, y0 + (y1 - y0) * b)],
                    fill=color,
                    width=2,
                )
