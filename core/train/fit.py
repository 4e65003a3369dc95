"""fit(): the training loop. Only gates learn; it can be interrupted at any step and goes on where it was."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ..errors import FormatError, MergeError
from ..formats.files import read_tensors, write_tensors
from ..json_text import from_json
from ..mole.attach import Attachment
from ..mole.gates import balance_loss, entropy
from ..mole.observers import CollectedGates
from ..mole.recompute import exact_gradients
from ..progress import Progress
from .settings import FitSettings

_KIND = "legomole.training.1"
_SAVE_EVERY = 25  # steps
_EPSILON = 1e-12  # of AdamW: in a large model a single gate moves the loss by very little


class Objective(Protocol):
    """What is learnt: a number of examples, and the loss of some of them."""

    size: int

    def loss(self, indices: Sequence[int]) -> Tensor:
        """Mean loss of these examples, with the gates' graph behind it."""
        ...


class Devices(Protocol):
    """Several processes that train one set of gates together, each with a part of every batch."""

    rank: int
    world: int

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes."""
        ...


@dataclass
class FitRecord:
    """What came of it.

    Attributes:
        losses: Of every step, without the balance loss. entropies: Of the gates at every step, in nats.
        stopped: Why it ended before the last step; ``""`` if it did not.
    """

    losses: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    stopped: str = ""


def fit(
    attachment: Attachment,
    objective: Objective,
    settings: FitSettings,
    *,
    key: str = "",
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    run: FitRecord | None = None,
) -> FitRecord:
    """Train the attachment's gates in place.

    Args:
        attachment: A mixture on its model, with gates (see `core.train.features`).
        objective: What to learn. settings: How.
        key: Tells this training from others; a state in `folder` under another key is refused.
        folder: Where to keep the state: written every few steps and when interrupted, read at the start.
        devices: Others that train along; every process must call this with the same examples and settings.
        progress: Called with (steps done, steps in all, the loss in words). May raise to cancel: the state is kept.
        run: Where to note how it goes, for a caller that wants to know after a cancel too.

    Raises:
        MergeError: The loss was not a finite number from the start.
    """
    gates = attachment.bank.gates
    parameters = attachment.bank.parameters_of_gates
    optimizer = torch.optim.AdamW(
        parameters, lr=settings.learning_rate, weight_decay=settings.weight_decay, foreach=False, eps=_EPSILON
    )
    run = run or FitRecord()
    start = _resume(folder, key, parameters, optimizer, run) if folder is not None else 0
    good = _snapshot(parameters)
    done = start
    try:
        for step in range(start, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * schedule(step, settings.steps, settings.warmup)
            loss, spread = _step(attachment, objective, settings, step, devices, parameters)
            if not math.isfinite(loss) or not all(
                torch.isfinite(p.grad).all() for p in parameters if p.grad is not None
            ):
                _restore(parameters, good)
                if step == 0:
                    raise MergeError(
                        "The loss is not a finite number, from the first step on.",
                        found=loss,
                        remedy="check that the model works with the LoRAs; train in float32 or bfloat16",
                    )
                what = "its gradient was not finite" if math.isfinite(loss) else f"the loss became {loss}"
                run.stopped = f"{what} at step {step + 1}; the gates are those of the step before"
                break
            good = _snapshot(parameters)
            optimizer.step()
            optimizer.zero_grad()
            done = step + 1
            run.losses.append(loss)
            run.entropies.append(spread)
            if folder is not None and done % _SAVE_EVERY == 0 and done < settings.steps:
                _save(folder, key, parameters, optimizer, run, devices)
            if progress is not None:
                progress(done, settings.steps, f"loss {loss:.4g}")
            if settings.patience and _stale(run.losses, settings.patience):
                run.stopped = f"the loss had not improved for {settings.patience} steps, at step {done}"
                break
    except BaseException:  # cancelled, or the machine ran out of something: nothing learnt is lost
        if folder is not None and done > start:
            _save(folder, key, parameters, optimizer, run, devices)
        raise
    if not all(torch.isfinite(p).all() for p in gates.parameters()):
        _restore(parameters, good)
        run.stopped = run.stopped or "the last step left numbers that are not finite; the gates are those before it"
    return run


def _step(
    attachment: Attachment,
    objective: Objective,
    settings: FitSettings,
    step: int,
    devices: Devices | None,
    parameters: Sequence[torch.nn.Parameter],
) -> tuple[float, float]:
    """Gradients of one batch, in parts; the mean loss and the gates' entropy."""
    batch = batch_of(step, objective.size, settings.batch, settings.seed)
    share_of_one = 1 / len(batch)
    if devices is not None:
        batch = batch[devices.rank :: devices.world]
        share_of_one *= devices.world  # of which the mean is taken below: right for uneven parts, too
    parts = [part for part in torch.tensor(batch, dtype=torch.long).chunk(settings.accumulation) if len(part)]
    total, spread = torch.zeros(()), 0.0
    for part in parts:
        seen = CollectedGates()
        share = len(part) * share_of_one
        with torch.enable_grad(), attachment.watch(seen), exact_gradients():
            loss = objective.loss(part.tolist())
            if not seen.values:
                raise MergeError(
                    "The gates were not seen at work.",
                    expected="a model that reaches at least one gate",
                    remedy="train before the model is compiled (torch.compile)",
                )
            whole = loss
            if settings.balance:
                whole = loss + settings.balance * balance_loss(list(seen.values.values()))
            (share * whole).backward()
        total += share * loss.detach().float().cpu()
        spread += share * float(entropy([value.detach() for value in seen.values.values()]))
    if devices is not None:
        for p in parameters:
            p.grad = devices.mean(torch.zeros_like(p) if p.grad is None else p.grad)
        total, spread = devices.mean(torch.tensor([float(total), spread])).tolist()
    return float(total), spread


def batch_of(step: int, size: int, batch: int, seed: int) -> list[int]:
    """Examples of one step: pass after pass through all of them, each in an order of its own."""
    chosen: list[int] = []
    position = step * batch
    while len(chosen) < batch:
        epoch, offset = divmod(position + len(chosen), size)
        order = torch.randperm(size, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch)).tolist()
        chosen += order[offset : offset + batch - len(chosen)]
    return chosen


def schedule(step: int, steps: int, warmup: int) -> float:
    """Factor on the learning rate: up in a line, down along a cosine."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _stale(losses: Sequence[float], patience: int) -> bool:
    """Whether the mean of the last `patience` losses is no lower than the best such mean before."""
    if len(losses) < 2 * patience:
        return False
    ends = range(patience, len(losses) - patience + 1)
    return sum(losses[-patience:]) >= min(sum(losses[end - patience : end]) for end in ends)


def _snapshot(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [p.detach().clone() for p in parameters]


def _restore(parameters: Sequence[torch.nn.Parameter], values: Sequence[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(parameters, values, strict=True):
            p.copy_(value)


def _path(folder: Path) -> Path:
    return folder / "state.safetensors"


def _save(
    folder: Path,
    key: str,
    parameters: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
    run: FitRecord,
    devices: Devices | None,
) -> None:
    if devices is not None and devices.rank != 0:
        return
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(parameters):
        tensors[f"{i}/value"] = p
        for name, value in optimizer.state.get(p, {}).items():
            tensors[f"{i}/{name}"] = torch.as_tensor(value)
    record = json.dumps({"losses": run.losses, "entropies": run.entropies})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(_path(folder), tensors, {"kind": _KIND, "key": key, "run": record})


def _resume(
    folder: Path, key: str, parameters: Sequence[torch.nn.Parameter], optimizer: torch.optim.Optimizer, run: FitRecord
) -> int:
    """Take up the state in the folder; the number of steps it has done, 0 if there is none."""
    if (state := read_state(folder, key)) is None:
        return 0
    tensors, header = state
    try:
        before = from_json(header["run"])
        with torch.no_grad():
            for i, p in enumerate(parameters):
                value = tensors[f"{i}/value"]
                own = {k.partition("/")[2]: v.clone() for k, v in tensors.items() if k.startswith(f"{i}/")}
                del own["value"]
                wrong = [] if value.shape == p.shape else ["value"]
                wrong += [k for k, v in own.items() if v.shape != (() if k == "step" else p.shape)]
                if wrong or (own and set(own) != {"step", "exp_avg", "exp_avg_sq"}):
                    raise ValueError(f"what it holds of parameter {i} is of another size or kind")
                p.copy_(value)
                if own:
                    own = {k: v.float() for k, v in own.items()}
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in own.items()}
        run.losses, run.entropies = ([float(x) for x in before[name]] for name in ("losses", "entropies"))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise FormatError(
            "The training cannot be taken up again.",
            file=_path(folder),
            found=str(error),
            remedy="delete it to start anew",
        ) from error
    return len(run.losses)


def read_state(folder: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors and metadata of the training that `folder` holds; ``None`` if it holds none.

    Raises:
        FormatError: It holds another training, or a damaged file.
    """
    path = _path(folder)
    if not path.exists():
        return None
    try:
        tensors, header = read_tensors(path)
    except FormatError as error:
        raise FormatError(error.problem, file=path, found=error.found, remedy="delete it to start anew") from error
    if header.get("kind") != _KIND or header.get("key") != key:
        raise FormatError(
            "The folder holds the state of another training.",
            file=path,
            expected=key or "the same settings, model, LoRAs and prompts",
            found=header.get("key", "another kind of file"),
            remedy="go on with the settings it was begun with, or name another folder",
        )
    return tensors, header
