"""Train the small language model, and an adapter for every new task; each result is a folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ...common import Say
from .tasks import BASE, BOS, EOS, LONGEST, NEW, PAD, VOCABULARY, Task, accuracy, draw

RANK = 8
# each alone, and two in succession, except double twice, whose output would be four times as long
BASE_TASKS: list[Task] = [
    *((name,) for name in BASE),
    *(pair for pair in itertools.product(BASE, BASE) if pair != ("double", "double")),
]


@dataclass(frozen=True)
class Size:
    """Amount of training, and shape of the model.

    Args:
        base: Training steps of the base model. adapter: Training steps of an adapter. batch: Texts per step.
        width: Hidden size of the model. blocks: Number of its blocks.
    """

    base: int = 2000
    adapter: int = 250
    batch: int = 64
    width: int = 96
    blocks: int = 4


SMOKE = Size(base=3, adapter=3, batch=8, width=16, blocks=2)


def build(size: Size) -> LlamaForCausalLM:
    """Build the untrained model from the global random seed."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=size.width, intermediate_size=3 * size.width,
            num_hidden_layers=size.blocks, num_attention_heads=4, max_position_embeddings=8 * LONGEST,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
        )
    )  # fmt: skip


def base_model(work: Path, size: Size, say: Say) -> Any:
    """Return the frozen base model; train it if it is not in `work`."""
    folder = work / "base"
    if not folder.exists():
        torch.manual_seed(0)
        model = build(size).train()
        _fit(model, BASE_TASKS, size.base, size.batch, lr=2e-3, seed=0, say=say, what="base")
        _save(model, folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def adapter(work: Path, task: str, seed: int, size: Size, say: Say) -> Path:
    """Return the folder of a task's adapter; train it if it does not exist, from its own seed and examples."""
    folder = work / f"{task.replace(' ', '-')}-{seed}"
    if not folder.exists():
        number = 1000 + 100 * seed + list(NEW).index(task)
        torch.manual_seed(number)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base_model(work, size, say), config).train()
        _fit(model, [(task,)], size.adapter, size.batch, lr=4e-3, seed=number, say=say, what=folder.name)
        _save(model, folder)
    return folder


def _fit(
    model: Any, tasks: Sequence[Task], steps: int, batch: int, *, lr: float, seed: int, say: Say, what: str
) -> None:
    began = time.monotonic()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = model(**draw(tasks, batch, 1_000_003 * seed + step).inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            say(f"{what}: {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - began:.0f} s")
    model.eval()
    right = accuracy(model, draw(tasks, 256, 77))
    say(f"{what}: right {right:.2f} after {time.monotonic() - began:.0f} s")


def _save(model: Any, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    part.rename(folder)
