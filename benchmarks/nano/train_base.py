"""Train the base model on the base subjects and styles, in one process or in several together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from legomole.nano.model import SIDE, Prompts, build, short_prompts
from torch import Tensor, nn

from ..common import Say
from ..processes import average_gradients
from .data import Captioned, draw


def train(
    data: Captioned, steps: int, *, batch: int = 32, lr: float = 1.2e-3, seed: int = 0,
    initial: Mapping[str, Tensor] | None = None, frozen: Sequence[str] = (), prompts: Prompts | None = None,
    architecture: Callable[[], Any] = build, say: Say = print,
    save: Callable[[dict[str, Any]], None] = lambda _: None, resume: dict[str, Any] | None = None,
    every: int = 250, device: str = "cpu",
) -> dict[str, Tensor]:  # fmt: skip
    """Train the base model.

    Args:
        data: Training examples.
        steps: Number of steps, over which the learning rate falls to zero.
        batch: Square examples per step, in all processes together; of wider ones as many as have the same area.
        lr: Highest learning rate of AdamW.
        seed: Random seed of the initial weights and of the batches.
        initial: Weights to fine-tune. Default: a new model.
        frozen: Names of submodules that are not trained.
        prompts: Encoder of short prompts. Default: the nano model's.
        architecture: Builds the untrained model.
        say: Called with progress messages.
        save: Called with the training state every `every` steps.
        resume: Saved training state to continue from.
        device: Device to compute on; it does not change the batches.

    Returns:
        Exponential moving average of the weights, float32.
    """
    torch.manual_seed(seed)
    model, prompts, rng = architecture().train(), prompts or Prompts(short=True), torch.Generator().manual_seed(seed)
    if initial is None:
        _start(model)
    else:
        model.load_state_dict(initial)
    for name in frozen:
        model.get_submodule(name).requires_grad_(False)
    model.to(device)
    average = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer,
        lr,
        total_steps=max(steps, 3),  # a shorter schedule has no way down
        pct_start=min(0.5, max(0.05, 2 / steps)),
        anneal_strategy="cos",
        final_div_factor=100,
    )
    first = 0
    if resume is not None:
        model.load_state_dict(resume["model"])
        optimizer.load_state_dict(resume["optimizer"])
        schedule.load_state_dict(resume["schedule"])
        rng.set_state(resume["rng"])
        average, first = {name: tensor.to(device) for name, tensor in resume["average"].items()}, resume["step"]
    began, losses = time.monotonic(), []
    with short_prompts(model, prompts.tokens):
        for step in range(first, steps):
            drawn = draw(data, batch * SIDE // data.latents.shape[-1], prompts, rng)
            loss = drawn.own_share().to(device).loss(model)
            optimizer.zero_grad()
            loss.backward()
            average_gradients(model.parameters())
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.item())
            decay = min(0.998, (1 + step) / (10 + step))
            with torch.no_grad():
                torch._foreach_lerp_(list(average.values()), list(model.parameters()), 1 - decay)
            if step % 50 == 49 or step == steps - 1:
                say(f"base {step + 1}/{steps} loss {sum(losses) / len(losses):.4f} {time.monotonic() - began:.0f} s")
                losses = []
            if step % every == every - 1:
                save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "rng": rng.get_state(),
                      "schedule": schedule.state_dict(), "average": average, "step": step + 1})  # fmt: skip
    return {name: tensor.cpu() for name, tensor in {**model.state_dict(), **average}.items()}


def _start(model: Any) -> None:
    """Start every block as the identity, and the prediction as zero."""
    model.pos_embed.pos_embed = model.pos_embed.pos_embed.half().float()
    for block in model.transformer_blocks:
        for norm in (block.norm1, block.norm1_context):
            nn.init.zeros_(norm.linear.weight)
            nn.init.zeros_(norm.linear.bias)
    nn.init.zeros_(model.norm_out.linear.weight)
    nn.init.zeros_(model.norm_out.linear.bias)
    nn.init.zeros_(model.proj_out.weight)
    nn.init.zeros_(model.proj_out.bias)
