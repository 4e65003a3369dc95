"""Train an adapter for a task; the result is a PEFT folder."""

from __future__ import annotations

import random
import time
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.functional import cross_entropy

from ..common import Say
from .data import Example, Examples
from .model import last_logits

_LAYERS = {"all": "all-linear", "qv": ["q_proj", "v_proj"]}


@dataclass(frozen=True)
class Training:
    """Amount of training.

    Args:
        steps: Optimizer steps at most. batch: Prompts per step. lr: Highest learning rate.
    """

    steps: int = 120
    batch: int = 12
    lr: float = 5e-4


def adapter(model: Any, examples: Examples, seed: int, folder: Path, training: Training, say: Say) -> Path:
    """Return the folder of a task's adapter; train it if it does not exist, from its own seed and order of examples."""
    if folder.exists():
        return folder
    task, began = examples.task, time.monotonic()
    training = replace(training, steps=min(training.steps, task.steps))
    number = random.Random(f"{task.name} {seed}").getrandbits(31)
    torch.manual_seed(number)
    config = LoraConfig(
        r=task.rank, lora_alpha=2 * task.rank, target_modules=_LAYERS[task.layers], task_type="CAUSAL_LM"
    )
    wrapped = get_peft_model(model, config, autocast_adapter_dtype=False).train()
    parameters = [p for p in wrapped.parameters() if p.requires_grad]
    masters = masters_of(parameters)
    optimizer = torch.optim.AdamW(masters, lr=training.lr, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, training.lr, total_steps=training.steps, pct_start=0.1)
    first = torch.tensor(examples.first)
    losses: list[float] = []
    for batch in _batches(list(examples.train), training, random.Random(number)):
        answers = first[[example.label for example in batch]]
        loss = cross_entropy(last_logits(model, [example.ids for example in batch]).float(), answers)
        loss.backward()
        with stepping(parameters, masters):
            torch.nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            schedule.step()
        losses.append(loss.item())
        if len(losses) % 25 == 0:
            say(f"{folder.name}: step {len(losses)} loss {sum(losses[-25:]) / 25:.3f} {time.monotonic() - began:.0f} s")
    part = folder.with_name(f"{folder.name}.part")
    wrapped.save_pretrained(part)
    wrapped.unload()
    part.rename(folder)
    return folder


def masters_of(parameters: Sequence[Any]) -> list[Tensor]:
    """float32 copies of bfloat16 parameters, for an optimizer: bfloat16 would round small steps away."""
    return [parameter.detach().float() for parameter in parameters]


@contextmanager
def stepping(parameters: Sequence[Any], masters: Sequence[Tensor]) -> Generator[None]:
    """Move the gradients to the masters before an optimizer's step in the block, and the new values back after it."""
    for master, parameter in zip(masters, parameters, strict=True):
        master.grad, parameter.grad = parameter.grad.float(), None
    yield
    with torch.no_grad():
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.copy_(master)


def _batches(examples: list[Example], training: Training, draw: random.Random) -> list[list[Example]]:
    """Batches of like length, in random order, over as many epochs as needed."""
    if not examples:
        raise ValueError("there are no examples to train on")
    batches: list[list[Example]] = []
    while len(batches) < training.steps:
        draw.shuffle(examples)
        epoch: list[list[Example]] = []
        for start in range(0, len(examples), 8 * training.batch):
            part = sorted(examples[start : start + 8 * training.batch], key=lambda example: len(example.ids))
            epoch += [part[i : i + training.batch] for i in range(0, len(part), training.batch)]
        draw.shuffle(epoch)
        batches += epoch
    return batches[: training.steps]
