"""Train LoRAs on the base model independently: each on its own pictures, from its own seed."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.nano.model import Prompts, short_prompts
from peft import LoraConfig
from torch import nn

from ..common import Say
from .data import Captioned, draw
from .render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS

RANK = 4
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = (*ATTENTION, "ff.net.0.proj", "ff.net.2")


def pairs_of(concept: str, seed: int) -> list[tuple[str, str]]:
    """Return the pairs in a LoRA's pictures: its subject in three base styles, or its style on four base subjects."""
    rng = torch.Generator().manual_seed(1000 * seed + sum(map(ord, concept)))
    if concept in NEW_SUBJECTS:
        return [(concept, BASE_STYLES[i]) for i in torch.randperm(len(BASE_STYLES), generator=rng)[:3].tolist()]
    return [(BASE_SUBJECTS[i], concept) for i in torch.randperm(len(BASE_SUBJECTS), generator=rng)[:4].tolist()]


def train(
    base: Any, data: Captioned, prompts: Prompts, *, steps: int, seed: int, rank: int = RANK, batch: int = 16,
    lr: float = 1.5e-3, targets: Sequence[str] = TARGETS, say: Say = print, device: str = "cpu",
) -> Adapter:  # fmt: skip
    """Train a LoRA with diffusers' names and float16 factors.

    Args:
        base: Transformer; it is not modified.
        data: Training examples.
        prompts: Encoder of short prompts.
        steps: Number of steps. batch: Examples per step. lr: Highest learning rate of AdamW.
        seed: Random seed of the initial factors and of the batches.
        rank: Rank of every layer; the scale is 1.
        targets: Ends of the names of the layers.
        say: Called with progress messages.
        device: Device to compute on; it changes neither initial factors nor batches.
    """
    torch.manual_seed(seed)
    rng = torch.Generator().manual_seed(seed)
    model = deepcopy(base).requires_grad_(False)
    model.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(targets), init_lora_weights="gaussian"))
    model.to(device)
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    losses: list[float] = []
    with short_prompts(model, prompts.tokens):
        for _ in range(steps):
            loss = draw(data, batch, prompts, rng, empty=0.1).to(device).loss(model)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trainable, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
    say(f"lora {data.captions(0)[0]} .. seed {seed}: loss {sum(losses[:20]) / 20:.4f} -> {sum(losses[-20:]) / 20:.4f}")
    modules = {
        f"transformer.{name}": LowRank(
            layer.lora_A["default"].weight.detach().cpu().half().contiguous(),
            layer.lora_B["default"].weight.detach().cpu().half().contiguous(),
        )
        for name, layer in model.named_modules()
        if hasattr(layer, "lora_A")
    }
    return Adapter(modules)
