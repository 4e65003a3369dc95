"""fit(): the training loop. Only gates are trained; it can be interrupted at any step and resumed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.gates import balance_loss, entropy
from ..mole.observers import CollectedGates
from ..mole.recompute import exact_gradients
from ..progress import Progress
from .settings import FitSettings
from .state import FitRecord, resume_state, save_state

__all__ = ["Devices", "FitRecord", "Objective", "accumulate_gradients", "batch_of", "fit", "has_stalled", "schedule"]

_SAVE_EVERY = 25  # steps
_EPSILON = 1e-12  # of AdamW: in a large model a single gate changes the loss very little


class Objective(Protocol):
    """An objective: a number of examples, and the loss of some of them."""

    size: int

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Mean loss of these examples, with a graph that reaches the gates."""
        ...


class Devices(Protocol):
    """Several processes that train one set of gates together, each with a share of every batch."""

    rank: int
    world: int

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        ...


def fit(
    attachment: Attachment,
    objective: Objective,
    settings: FitSettings,
    *,
    key: str = "",
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    record: FitRecord | None = None,
) -> FitRecord:
    """Train the attachment's gates in place.

    Args:
        attachment: A mixture on its model, with gates (see `core.train.features`).
        objective: What the gates learn. settings: Settings of the fit.
        key: Identifies this training; a state in `folder` with another key is refused.
        folder: Folder for the state, which is written every few steps and on interruption, and read at the start.
        devices: Other processes that train along; each must call this with the same examples and settings.
        progress: Called with (steps done, total, the loss as text). May raise an exception to cancel; the state is
            kept.
        record: Record to fill, for a caller that needs it after a cancel.

    Raises:
        MergeError: The loss was not finite at the first step.
        FormatError: `folder` holds another training, or a damaged state.
    """
    gates = attachment.bank.gates
    parameters = attachment.bank.parameters_of_gates
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False, eps=_EPSILON
    )
    record = record or FitRecord()
    start = resume_state(folder, key, parameters, optimizer, record) if folder is not None else 0
    writes_files = devices is None or devices.rank == 0
    last_good = _cloned(parameters)
    steps_done = start
    try:
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings.steps, settings.warmup)
            loss, mean_entropy = accumulate_gradients(attachment, objective, settings, step, devices, parameters)
            gradients_finite = all(torch.isfinite(p.grad).all() for p in parameters if p.grad is not None)
            if not math.isfinite(loss) or not gradients_finite:
                _restore(parameters, last_good)
                if step == 0:
                    raise MergeError(
                        "The loss is not finite at the first step.",
                        found=loss,
                        remedy="check that the model works with the LoRAs; train in float32 or bfloat16",
                    )
                reason = "its gradient was not finite" if math.isfinite(loss) else f"the loss became {loss}"
                record.stopped = f"{reason} at step {step + 1}; the gates are those of the step before"
                break
            last_good = _cloned(parameters)
            optimizer.step()
            optimizer.zero_grad()
            steps_done = step + 1
            record.losses.append(loss)
            record.entropies.append(mean_entropy)
            if folder is not None and writes_files and steps_done % _SAVE_EVERY == 0 and steps_done < settings.steps:
                save_state(folder, key, parameters, optimizer, record)
            if progress is not None:
                progress(steps_done, settings.steps, f"loss {loss:.4g}")
            if settings.patience and has_stalled(record.losses, settings.patience):
                record.stopped = f"the loss had not improved for {settings.patience} steps, at step {steps_done}"
                break
    except BaseException:  # also a cancel or a lack of memory: nothing that was learnt is lost
        if folder is not None and writes_files and steps_done > start:
            save_state(folder, key, parameters, optimizer, record)
        raise
    if not all(torch.isfinite(p).all() for p in gates.parameters()):
        _restore(parameters, last_good)
        record.stopped = record.stopped or "the last step gave gates that are not finite; they are those before it"
    return record


def accumulate_gradients(
    attachment: Attachment,
    objective: Objective,
    settings: FitSettings,
    step: int,
    devices: Devices | None,
    parameters: Sequence[torch.nn.Parameter],
) -> tuple[float, float]:
    """Compute the gradients of one batch, in parts, into ``parameters[..].grad``.

    Returns:
        The mean loss without the balance loss, and the mean entropy of the gates.

    Source: arXiv:2404.13628: ``L = L_D + alpha L_balance`` with ``alpha = settings.balance``.
    """
    batch = batch_of(step, objective.size, settings.batch, settings.seed)
    share_of_one = 1 / len(batch)
    if devices is not None:
        batch = batch[devices.rank :: devices.world]
        share_of_one *= devices.world  # the mean over processes is taken below: exact for uneven shares, too
    parts = [part for part in torch.tensor(batch, dtype=torch.long).chunk(settings.accumulation) if len(part)]
    total, mean_entropy = torch.zeros(()), 0.0
    for part in parts:
        collected = CollectedGates()
        share = len(part) * share_of_one
        with torch.enable_grad(), attachment.watch(collected), exact_gradients():
            L_D = objective.loss(part.tolist())
            if not collected.values:
                raise MergeError(
                    "No gate opened while the loss was computed.",
                    expected="a model that reaches at least one gate",
                    remedy="train before the model is compiled (torch.compile)",
                )
            L = L_D
            if settings.balance:
                L = L_D + settings.balance * balance_loss(list(collected.values.values()))
            (share * L).backward()
        total += share * L_D.detach().float().cpu()
        mean_entropy += share * float(entropy([value.detach() for value in collected.values.values()]))
    if devices is not None:
        for p in parameters:
            p.grad = devices.mean(torch.zeros_like(p) if p.grad is None else p.grad)
        total, mean_entropy = devices.mean(torch.tensor([float(total), mean_entropy])).tolist()
    return float(total), mean_entropy


def batch_of(step: int, size: int, batch: int, seed: int) -> list[int]:
    """Indices of the examples of one step: epoch after epoch through all of them, each in another random order."""
    indices: list[int] = []
    position = step * batch
    while len(indices) < batch:
        epoch, offset = divmod(position + len(indices), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        indices += order[offset : offset + batch - len(indices)]
    return indices


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: linear warmup, then cosine decay to 0."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def has_stalled(losses: Sequence[float], patience: int) -> bool:
    """Whether the mean of the last `patience` losses is no lower than the best earlier mean of as many."""
    if len(losses) < 2 * patience:
        return False
    ends = range(patience, len(losses) - patience + 1)
    return sum(losses[-patience:]) >= min(sum(losses[end - patience : end]) for end in ends)


def _cloned(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _restore(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)
