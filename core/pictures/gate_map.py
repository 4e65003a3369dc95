"""Gate maps: the gates of a mixture over a sampling run, by scope and by pass."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..mole.gates import entropy
from .charts import heat_map, lines, stacked

if TYPE_CHECKING:
    from PIL.Image import Image

_WIDTH = 660  # pixels, at least


def means_and_entropies(table: Tensor) -> tuple[Tensor, Tensor]:
    """Summarise gate values pass by pass.

    Args:
        table: Gate values ``(passes, scopes, N)``, see `Record.table`.

    Returns:
        Mean gate of each expert ``(passes, N)``, and `mole.gates.entropy` of each pass ``(passes,)`` in nats.
    """
    return table.mean(1), torch.stack([entropy([gates]) for gates in table])


def gate_map(table: Tensor, scopes: Sequence[str], labels: Sequence[str]) -> Image:
    """Draw scopes x experts as a heat map of the mean over all passes, and below it the means and entropies by pass.

    Args:
        table: Gate values ``(passes, scopes, N)``.
        scopes: Names of the scopes.
        labels: Names of the experts.
    """
    means, entropies = means_and_entropies(table)
    count = f"{len(table)} pass{'es' * (len(table) != 1)} of the model"
    heat = heat_map(table.mean(0), scopes, labels, f"Gates, mean over {count}")
    width, largest = max(heat.width, _WIDTH), math.log(len(labels))
    by_expert = [(label, means[:, n].tolist()) for n, label in enumerate(labels)]
    ends = f": 0 if only one LoRA is used, {largest:.2f} if all are used equally" if largest else ""
    return stacked(
        [
            heat,
            lines(by_expert, "Mean gate of each LoRA, by pass", width=width),
            lines(
                [("entropy", entropies.tolist())],
                f"Entropy in nats{ends}",
                high=largest or 1.0,
                width=width,
                height=150,
            ),
        ]
    )
