"""Generate two small LoRAs for lego.png: with the layers of SD 1.5's first blocks, but different formats and ranks."""

from __future__ import annotations

from pathlib import Path

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank

_BLOCKS = ("down_blocks.0.attentions.0", "down_blocks.0.attentions.1")
_LAYERS = {  # layer of a transformer block -> (d_out, d_in)
    "attn1.to_q": (320, 320),
    "attn1.to_k": (320, 320),
    "attn1.to_v": (320, 320),
    "attn1.to_out.0": (320, 320),
    "attn2.to_q": (320, 320),
    "attn2.to_k": (320, 768),
    "attn2.to_v": (320, 768),
    "attn2.to_out.0": (320, 320),
    "ff.net.0.proj": (2560, 320),
    "ff.net.2": (320, 1280),
}
_SHARED = 2  # units common to both LoRAs, as in LoRAs by one trainer or author


def write_pair(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Write a "style" LoRA (rank 8, kohya names, float16) and a "subject" LoRA (rank 4, diffusers names, float16).

    They share two directions per layer. As in real files, the factors of each LoRA are rotated, which does not change
    its delta.

    Args:
        folder: Output folder; created if missing.
        seed: Random seed.

    Returns:
        Paths of the two files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    style: dict[str, LowRank] = {}
    subject: dict[str, LowRank] = {}
    for block in _BLOCKS:
        for layer, (d_out, d_in) in _LAYERS.items():
            name = f"{block}.transformer_blocks.0.{layer}"
            shared = _units(_SHARED, d_out, d_in, generator)
            style[f"lora_unet_{name.replace('.', '_')}"] = _rotated(
                shared, _units(8 - _SHARED, d_out, d_in, generator), generator, alpha=4.0
            ).to(torch.float16)
            subject[f"unet.{name}"] = _rotated(shared, _units(4 - _SHARED, d_out, d_in, generator), generator).to(
                torch.float16
            )
    metadata = {"ss_base_model_version": "sd_v1"}
    return (
        save(Adapter(style, metadata=metadata), folder / "style.safetensors", format="kohya"),
        save(Adapter(subject), folder / "subject.safetensors", format="diffusers"),
    )


def _units(r: int, d_out: int, d_in: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random units ``A (r, d_in)``, ``B (d_out, r)`` of decreasing size, as in trained LoRAs."""
    size = 0.6 ** torch.arange(r)
    A = torch.randn(r, d_in, generator=generator) / d_in**0.5
    return A, torch.randn(d_out, r, generator=generator) / d_out**0.5 * size


def _rotated(
    shared: tuple[torch.Tensor, torch.Tensor],
    unique: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
    alpha: float | None = None,
) -> LowRank:
    """Combine shared units with those of this LoRA and rotate the factors: ``(B R^T) (R A) = B A``."""
    A, B = torch.cat([shared[0], unique[0]]), torch.cat([shared[1], unique[1]], 1)
    R = torch.linalg.qr(torch.randn(len(A), len(A), generator=generator)).Q
    scale = 1.0 if alpha is None else alpha / len(A)
    return LowRank(R @ A, B @ R.T / scale, alpha)
