"""State of an unfinished training as a file: the gates' parameters, the optimizer's state and the record so far."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from ..errors import FormatError
from ..formats.files import read_tensors, write_tensors
from ..json_text import from_json

STATE_FILE = "state.safetensors"
_KIND = "legomole.training.1"


@dataclass
class FitRecord:
    """Record of a fit.

    Attributes:
        losses: Loss of every step, without the balance loss.
        entropies: Mean entropy of the gates at every step, in nats.
        stopped: Why the fit ended before the last step; ``""`` if it did not.
    """

    losses: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    stopped: str = ""


def save_state(
    folder: Path, key: str, parameters: Sequence[Tensor], optimizer: torch.optim.Optimizer, record: FitRecord
) -> None:
    """Write the state to `folder`, atomically."""
    tensors: dict[str, Tensor] = {}
    for i, p in enumerate(parameters):
        tensors[f"{i}/value"] = p
        for name, value in optimizer.state.get(p, {}).items():
            tensors[f"{i}/{name}"] = torch.as_tensor(value)
    run = json.dumps({"losses": record.losses, "entropies": record.entropies})
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(folder / STATE_FILE, tensors, {"kind": _KIND, "key": key, "run": run})


def resume_state(
    folder: Path,
    key: str,
    parameters: Sequence[torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    record: FitRecord,
) -> int:
    """Restore parameters, optimizer and record from `folder`, in place.

    Returns:
        The number of steps that were done; 0 if the folder holds no state.

    Raises:
        FormatError: The folder holds another training, or a damaged file.
    """
    if (state := read_state(folder, key)) is None:
        return 0
    tensors, header = state
    try:
        before = from_json(header["run"])
        with torch.no_grad():
            for i, p in enumerate(parameters):
                value = tensors[f"{i}/value"]
                state_of_p = {k.partition("/")[2]: v.clone() for k, v in tensors.items() if k.startswith(f"{i}/")}
                del state_of_p["value"]
                wrong = [] if value.shape == p.shape else ["value"]
                wrong += [k for k, v in state_of_p.items() if v.shape != (() if k == "step" else p.shape)]
                if wrong or (state_of_p and set(state_of_p) != {"step", "exp_avg", "exp_avg_sq"}):
                    raise ValueError(f"its state of parameter {i} is of another size or kind")
                p.copy_(value)
                if state_of_p:
                    state_of_p = {k: v.float() for k, v in state_of_p.items()}
                    optimizer.state[p] = {k: v if k == "step" else v.to(p.device) for k, v in state_of_p.items()}
        record.losses, record.entropies = ([float(x) for x in before[name]] for name in ("losses", "entropies"))
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise FormatError(
            "The training cannot be resumed.",
            file=folder / STATE_FILE,
            found=str(error),
            remedy="delete the file to start again",
        ) from error
    return len(record.losses)


def read_state(folder: Path, key: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """The tensors and metadata of the state in `folder`; ``None`` if there is none.

    Raises:
        FormatError: The folder holds another training, or a damaged file.
    """
    path = folder / STATE_FILE
    if not path.exists():
        return None
    try:
        tensors, header = read_tensors(path)
    except FormatError as error:
        raise FormatError(
            error.problem, file=path, found=error.found, remedy="delete the file to start again"
        ) from error
    if header.get("kind") != _KIND or header.get("key") != key:
        raise FormatError(
            "The folder holds the state of another training.",
            file=path,
            expected=key or "the same settings, model, LoRAs and prompts",
            found=header.get("key", "another kind of file"),
            remedy="continue with the settings of that training, or choose another folder",
        )
    return tensors, header
