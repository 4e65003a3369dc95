"""Random LoRAs to merge, with the layers of SDXL, Flux and a Llama of 8 billion weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank

from ..llm.many import SHAPES
from .memory import sdxl_layers

Layer = tuple[str, int, int]  # name, d_out, d_in


def flux_layers(width: int = 3072) -> Iterator[Layer]:
    """Yield the 304 layers of Flux that kohya trains, in 19 double and 38 single blocks."""
    for block in range(19):
        for part in ("img", "txt"):
            name = f"lora_unet_double_blocks_{block}_{part}"
            yield f"{name}_attn_qkv", 3 * width, width
            yield f"{name}_attn_proj", width, width
            yield f"{name}_mlp_0", 4 * width, width
            yield f"{name}_mlp_2", width, 4 * width
            yield f"{name}_mod_lin", 6 * width, width
    for block in range(38):
        name = f"lora_unet_single_blocks_{block}"
        yield f"{name}_linear1", 7 * width, width
        yield f"{name}_linear2", width, 5 * width
        yield f"{name}_modulation_lin", 3 * width, width


def llm_layers() -> Iterator[Layer]:
    """Yield the 224 linear layers of a Llama of 8 billion weights."""
    for block in range(32):
        for name, (d_out, d_in) in SHAPES.items():
            yield f"model.layers.{block}.{name}", d_out, d_in


@dataclass(frozen=True)
class Case:
    """LoRAs to merge into one of the same rank.

    Args:
        name: Name of the case and start of the file names.
        layers: Layers of the model. n: Number of LoRAs. rank: Rank of each.
        format: File format. dtype: Dtype of the factors.
    """

    name: str
    layers: Sequence[Layer]
    n: int
    rank: int
    format: str = "kohya"
    dtype: torch.dtype = torch.float16

    def write(self, folder: Path) -> list[Path]:
        """Write the LoRAs that do not exist yet, as files or, for PEFT, as folders."""
        end = "" if self.format == "peft" else ".safetensors"
        paths = [folder / f"{self.name}-{i:03}{end}" for i in range(self.n)]
        for seed, path in enumerate(paths):
            if not path.exists():
                save(self.lora(seed), path, format=self.format)
        return paths

    def lora(self, seed: int) -> Adapter:
        """Return a random LoRA, determined by the seed, with alpha half the rank."""
        generator = torch.Generator().manual_seed(seed)
        modules = {
            name: LowRank(
                (torch.randn(self.rank, d_in, generator=generator) / d_in**0.5).to(self.dtype),
                (torch.randn(d_out, self.rank, generator=generator) * 0.02).to(self.dtype),
                self.rank / 2,
            )
            for name, d_out, d_in in self.layers
        }
        return Adapter(modules)


def _cases() -> Iterator[Case]:
    sdxl, flux, llm = list(sdxl_layers()), list(flux_layers()), list(llm_layers())
    yield Case("sdxl-3x32", sdxl, 3, 32)
    yield Case("sdxl-4x64", sdxl, 4, 64)
    yield Case("flux-3x16", flux, 3, 16)
    yield Case("flux-3x32", flux, 3, 32)
    yield Case("llm-3x16", llm, 3, 16, "peft", torch.bfloat16)
    yield Case("llm-128x8", llm, 128, 8, "peft", torch.bfloat16)
    yield Case("smoke", [(f"lora_unet_smoke_{i}", 48, 32 + 16 * (i % 2)) for i in range(4)], 3, 4)


CASES = {case.name: case for case in _cases()}
PLAIN = ("sdxl-3x32", "sdxl-4x64", "flux-3x16", "flux-3x32", "llm-3x16")
LARGE = "llm-128x8"
