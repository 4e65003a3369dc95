"""Draw docs/images/lego.png from two generated LoRAs: `python docs/images/lego.py`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from legomole.core import formats
from legomole.core.merge.factors import FileFactors
from legomole.core.merge.methods.lego import Lego, balance_units
from legomole.core.merge.pool import Pool
from legomole.core.merge.rank import Rank
from pair import write_pair

LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
COLOURS = ("#3b6fb6", "#e08a2e")
K = 8


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        style, subject = (formats.load(path) for path in write_pair(Path(folder)))
        parts = [style.modules[f"lora_unet_{LAYER.replace('.', '_')}"], subject.modules[f"unet.{LAYER}"]]
        scale = torch.tensor([[part.scale for part in parts for _ in range(part.rank)]], dtype=torch.float64)
        pool = Pool(
            names=(LAYER,),
            factors=FileFactors([parts], torch.device("cpu")),
            scale=scale,
            weights=torch.ones(1, 2, dtype=torch.float64),
            ranks=tuple(part.rank for part in parts),
            adapters=(0, 1),
        )
        units = balance_units(pool).apply(pool)
        merged = Lego(Rank(K))(pool)
        size_in = _sizes(units.A[0], units.B[0])
        size_out = _sizes(merged.A[0], merged.B[0])
        assert merged.labels is not None
        labels = merged.labels[0].tolist()
    owner = pool.owner.tolist()

    figure, axes = plt.subplots(figsize=(9, 3.6), dpi=110)
    x_in = [i * 1.0 + (0.8 if owner[i] else 0) for i in range(pool.size)]
    x_out = [(x_in[-1] - (K - 1) * 1.25) / 2 + k * 1.25 for k in range(K)]
    order = sorted(
        range(K), key=lambda k: sum(x for x, c in zip(x_in, labels, strict=True) if c == k) / labels.count(k)
    )
    place = {k: x_out[i] for i, k in enumerate(order)}
    for i, k in enumerate(labels):
        axes.plot([x_in[i], place[k]], [2.0, 1.0], color=COLOURS[owner[i]], lw=1.6, alpha=0.8, zorder=1)
        axes.bar(x_in[i], size_in[i], 0.8, 2.0, color=COLOURS[owner[i]], edgecolor="white", zorder=2)
    for k in range(K):
        members = [owner[i] for i, c in enumerate(labels) if c == k]
        left = place[k] - 0.4
        for colour in (0, 1):
            width = 0.8 * members.count(colour) / len(members)
            axes.bar(left, -size_out[k], width, 1.0, color=COLOURS[colour], align="edge", zorder=2)
            left += width
    axes.text(sum(x_in[:8]) / 8, 3.15, "style.safetensors: 8 units", ha="center", color=COLOURS[0], weight="bold")
    axes.text(sum(x_in[8:]) / 4, 3.15, "subject.safetensors: 4 units", ha="center", color=COLOURS[1], weight="bold")

    axes.text(
        sum(x_out) / K,
        -0.25,
        f"one LoRA of {K} units: like units become one, the others stay apart",
        ha="center",
        weight="bold",
    )
    axes.set_ylim(-0.35, 3.3)
    axes.axis("off")
    figure.savefig(Path(__file__).with_suffix(".png"), bbox_inches="tight", metadata={"Software": None})


def _sizes(A: torch.Tensor, B: torch.Tensor) -> list[float]:
    sizes = A.norm(dim=1) * B.norm(dim=0)
    return (sizes / 1.9).clamp_max(1.0).tolist()


if __name__ == "__main__":
    main()
