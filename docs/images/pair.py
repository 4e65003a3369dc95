"""Two small LoRAs made on the spot for lego.png: shaped like SD 1.5's first blocks, unlike in all else."""

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
_SHARED = 2  # units both LoRAs have in common, as LoRAs of one trainer or author do


def write_pair(folder: Path, seed: int = 0) -> tuple[Path, Path]:
    """Make a "style" (rank 8, kohya names, float16) and a "subject" (rank 4, diffusers names, float16).

    They share two directions a layer, hidden as in real files: every LoRA mixes its units in a way of its own, which
    leaves its delta as it is.

    Args:
        folder: Where to write; made if missing. seed: Of all the numbers.

    Returns:
        The two paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    style: dict[str, LowRank] = {}
    subject: dict[str, LowRank] = {}
    for block in _BLOCKS:
        for layer, (d_out, d_in) in _LAYERS.items():
            name = f"{block}.transformer_blocks.0.{layer}"
            shared = _units(_SHARED, d_out, d_in, generator)
            style[f"lora_unet_{name.replace('.', '_')}"] = _mixed(
                shared, _units(8 - _SHARED, d_out, d_in, generator), generator, alpha=4.0
            ).to(torch.float16)
            subject[f"unet.{name}"] = _mixed(shared, _units(4 - _SHARED, d_out, d_in, generator), generator).to(
                torch.float16
            )
    said = {"ss_base_model_version": "sd_v1"}
    return (
        save(Adapter(style, metadata=said), folder / "style.safetensors", format="kohya"),
        save(Adapter(subject), folder / "subject.safetensors", format="diffusers"),
    )


def _units(r: int, d_out: int, d_in: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random units ``A (r, d_in)``, ``B (d_out, r)`` whose sizes fall off, as those of trained LoRAs do."""
    size = 0.6 ** torch.arange(r)
    A = torch.randn(r, d_in, generator=generator) / d_in**0.5
    return A, torch.randn(d_out, r, generator=generator) / d_out**0.5 * size


def _mixed(
    shared: tuple[torch.Tensor, torch.Tensor],
    own: tuple[torch.Tensor, torch.Tensor],
    generator: torch.Generator,
    alpha: float | None = None,
) -> LowRank:
    """Shared and own units in one LoRA, rotated among each other: ``(B R^T) (R A) = B A``."""
    A, B = torch.cat([shared[0], own[0]]), torch.cat([shared[1], own[1]], 1)
    R = torch.linalg.qr(torch.randn(len(A), len(A), generator=generator)).Q
    scale = 1.0 if alpha is None else alpha / len(A)
    return LowRank(R @ A, B @ R.T / scale, alpha)
