"""Train the small language model, and an adapter for every new task; each finished one is a folder."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from .tasks import BASE, BOS, EOS, LONGEST, NEW, PAD, VOCABULARY, Task, accuracy, draw

RANK = 8
# Alone, and one after another but for what would be four times as long.
BASE_TASKS: list[Task] = [
    *((name,) for name in BASE),
    *(pair for pair in itertools.product(BASE, BASE) if pair != ("double", "double")),
]
Say = Callable[[str], None]


@dataclass(frozen=True)
class Size:
    """How long to train: steps of the base model and of every adapter, texts per step; and the model's shape."""

    base: int = 2000
    adapter: int = 250
    batch: int = 64
    width: int = 96
    blocks: int = 4


SMOKE = Size(base=3, adapter=3, batch=8, width=16, blocks=2)


def build(size: Size) -> LlamaForCausalLM:
    """The model, untrained; the global seed decides."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=size.width, intermediate_size=3 * size.width,
            num_hidden_layers=size.blocks, num_attention_heads=4, max_position_embeddings=8 * LONGEST,
            bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=False,
        )
    )  # fmt: skip


def base_model(work: Path, size: Size, say: Say) -> Any:
    """The trained base model, frozen; trained now if it is not in `work`."""
    folder = work / "base"
    if not folder.exists():
        torch.manual_seed(0)
        model = build(size).train()
        _fit(model, BASE_TASKS, size.base, size.batch, lr=2e-3, seed=0, say=say, what="base")
        _keep(model, folder)
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


def adapter(work: Path, task: str, seed: int, size: Size, say: Say, *, careful: bool = False) -> Path:
    """The folder of a task's adapter, with its own start and its own examples; trained now if it is not there.

    `careful`: every second example is one of the base model's, so that the adapter leaves those as they are.
    """
    folder = work / f"{task.replace(' ', '-')}-{seed}{'-careful' if careful else ''}"
    if not folder.exists():
        number = 1000 + 100 * seed + list(NEW).index(task)
        torch.manual_seed(number)
        config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(base_model(work, size, say), config).train()
        what = folder.name
        shown = [(task,)] * len(BASE_TASKS) + BASE_TASKS if careful else [(task,)]
        _fit(model, shown, size.adapter, size.batch, lr=4e-3, seed=number, say=say, what=what)
        _keep(model, folder)
    return folder


def _fit(
    model: Any, tasks: Sequence[Task], steps: int, batch: int, *, lr: float, seed: int, say: Say, what: str
) -> None:
    began = time.monotonic()
    own = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(own, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        loss = model(**draw(tasks, batch, 1_000_003 * seed + step).inputs).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(own, 1.0)
        optimizer.step()
        schedule.step()
        if step % 500 == 499:
            say(f"{what}: {step + 1}/{steps} loss {loss.item():.4f} {time.monotonic() - began:.0f} s")
    model.eval()
    right = accuracy(model, draw(tasks, 256, 77))
    say(f"{what}: right {right:.2f} after {time.monotonic() - began:.0f} s")


def _keep(model: Any, folder: Path) -> None:
    part = folder.with_name(f"{folder.name}.part")
    model.save_pretrained(part)
    part.rename(folder)
