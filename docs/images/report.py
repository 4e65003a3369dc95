"""Draw docs/images/report.png with `legomole inspect --plot`: `python docs/images/report.py`.

The three generated LoRAs have the layers of a small Flux: two share a direction in the first blocks and work against
each other in the middle ones, the third overlaps with neither.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
from legomole.cli import app
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank

_LAYERS = {"attn.to_q": (64, 64), "attn.to_k": (64, 64), "attn.to_v": (64, 64), "ff.net.0.proj": (256, 64)}
_BLOCKS = 9


def main() -> None:
    generator = torch.Generator().manual_seed(0)

    def units(r: int, d_out: int, d_in: int, size: float) -> tuple[torch.Tensor, torch.Tensor]:
        A = torch.randn(r, d_in, generator=generator) / d_in**0.5
        return A, torch.randn(d_out, r, generator=generator) / d_out**0.5 * size * 0.7 ** torch.arange(r)

    loras: dict[str, dict[str, LowRank]] = {"style": {}, "subject": {}, "light": {}}
    for block in range(_BLOCKS):
        # weight of the units that style and subject share in this block, and size of each LoRA
        shared = (0.9, 0.6, 0.2, -0.7, -1.0, -0.6, 0.0, 0.0, 0.0)[block]
        size_of = {"style": 0.5 + block / 6, "subject": 1.6 - block / 9, "light": 1.3 if 2 < block < 6 else 0.5}
        for layer, (d_out, d_in) in _LAYERS.items():
            name = f"transformer.transformer_blocks.{block}.{layer}"
            A, B = units(3, d_out, d_in, 1.0)
            for lora, rank in (("style", 8), ("subject", 5), ("light", 4)):
                unique = units(rank, d_out, d_in, size_of[lora])
                part = (0.0, 1.0)[lora == "style"] if lora != "subject" else shared
                loras[lora][name] = LowRank(
                    torch.cat([A, unique[0]]) if part else unique[0],
                    torch.cat([B * part * 1.2, unique[1]], 1) if part else unique[1],
                )
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            str(save(Adapter(modules), Path(folder) / f"{name}.safetensors", format="diffusers"))
            for name, modules in loras.items()
        ]
        target = Path(__file__).with_suffix(".png")
        app(["inspect", *paths, "--plot", str(target), "--overwrite"], standalone_mode=False)


if __name__ == "__main__":
    main()
