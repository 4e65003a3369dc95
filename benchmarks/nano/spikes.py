"""A spectral spike in two LoRAs, and the cap against it: joint pictures before, with the spike, and capped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.merge.engine import merge
from legomole.core.merge.methods import MergeMethod
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank

from ..common import mean, spiked
from .evaluate import Bench, LoraKey
from .joint_rows import Rows

TIMES, CAP = 20.0, 8.0
LAYER = "transformer.transformer_blocks.1.ff.net.0.proj"
"""The feed-forward layer that gets the spike."""
STRENGTH = 1.15
SETS: tuple[LoraKey, ...] = (
    (("heart", "ember"), 0), (("fish", "wood"), 1), (("heart", "shadow"), 2),
    (("house", "wood"), 0), (("heart", "ember"), 1), (("fish", "wood"), 2),
)  # fmt: skip
METHODS: dict[str, MergeMethod] = {"sum": Concat(), "svd": SVD(Rank(1, "x")), "lego": Lego(Rank(1, "x"))}


def with_spike(adapter: Adapter, times: float = TIMES) -> Adapter:
    """Multiply the largest singular value of one feed-forward layer."""
    return replace(adapter, modules={**adapter.modules, LAYER: spiked(adapter.modules[LAYER], times)})


def measure(bench: Bench, log: Path, sets: Sequence[LoraKey] = SETS) -> list[dict[str, Any]]:
    """Measure every method on sound LoRAs, with a spike in both, and with the cap on either.

    Returns:
        Per set and method the joint scores ``sound``, ``spiked``, ``spiked capped`` and ``sound capped``.
    """
    rows = Rows(bench, log)
    results: list[dict[str, Any]] = []
    for key in sets:
        sound = bench.loras(*key).adapters
        with_spikes = tuple(map(with_spike, sound))
        for name, method in METHODS.items():
            scores: dict[str, float] = {}
            cases = {"sound": (sound, None), "spiked": (with_spikes, None), "spiked capped": (with_spikes, CAP),
                     "sound capped": (sound, CAP)}  # fmt: skip
            for case, (adapters, cap) in cases.items():

                def merged(
                    adapters: Sequence[Adapter] = adapters, method: MergeMethod = method, cap: float | None = cap
                ) -> Adapter:
                    return merge(adapters, method, dtype=torch.float32, cap=cap).adapter

                scores[case] = rows.score(key, f"{name} {case}", merged, STRENGTH)
            results.append({"concepts": key[0], "seed": key[1], "method": name, **scores})
    return results


CASES = ("sound", "spiked", "spiked capped", "sound capped")


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return a Markdown table of mean scores by method."""
    lines = [f"| method | sets | {' | '.join(CASES)} |", f"|---|---{'|---' * len(CASES)}|"]
    for name in METHODS:
        rows = [row for row in results if row["method"] == name]
        cells = (f"{mean([row[case] for row in rows]):.2f}" for case in CASES)
        lines.append(f"| {name} | {len(rows)} | {' | '.join(cells)} |")
    return "\n".join(lines)
