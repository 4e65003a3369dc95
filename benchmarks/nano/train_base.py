"""Train the base model on the base subjects and styles."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from legomole.nano.model import Prompts, build, short_prompts
from torch import Tensor, nn

from .data import Examples, draw


def train(
    data: Examples, steps: int, *, batch: int = 32, lr: float = 1.2e-3, seed: int = 0,
    say: Callable[[str], None] = print, keep: Callable[[dict[str, Any]], None] = lambda _: None,
    earlier: dict[str, Any] | None = None, every: int = 250, device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """The exponential mean of the weights, float32.

    Args:
        data: What to learn. steps: How long; the rate falls to zero over them. batch, lr: Of AdamW.
        seed: Of the start and of the batches.
        say: Told of the progress.
        keep: Given the state after `every` steps. earlier: A state kept before, to go on from.
        device: Where to compute; the batches are the same everywhere.
    """
    torch.manual_seed(seed)
    model, prompts, rng = build().train(), Prompts(short=True), torch.Generator().manual_seed(seed)
    model.pos_embed.pos_embed = model.pos_embed.pos_embed.half().float()
    for block in model.transformer_blocks:  # every block starts as the identity
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.norm_out.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
    model.to(device)
    mean = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        lr,
        total_steps=steps,
        pct_start=min(0.5, max(0.05, 2 / steps)),
        anneal_strategy="cos",
        final_div_factor=100,
    )
    first = 0
    if earlier is not None:
        model.load_state_dict(earlier["model"])
        optimizer.load_state_dict(earlier["optimizer"])
        schedule.load_state_dict(earlier["schedule"])
        rng.set_state(earlier["rng"])
        mean, first = {name: tensor.to(device) for name, tensor in earlier["mean"].items()}, earlier["step"]
    began, losses = time.monotonic(), []
    with short_prompts(model):
        for step in range(first, steps):
            loss = draw(data, batch, prompts, rng).to(device).loss(model)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            decay = min(0.998, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(mean.values()), list(model.parameters()), 1 - decay)
            if step % 50 == 49 or step == steps - 1:
                say(f"base {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} {time.monotonic() - began:.0f} s")
                losses = []
            if step % every == every - 1:
                keep({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state(),
                      "schedule": schedule.state_dict(), "mean": mean, "step": step + 1})  # fmt: skip
    return {name: tensor.cpu() for name, tensor in {**model.state_dict(), **mean}.items()}
