"""learn(): fit gates, keep what an interrupted training learnt, and clean up; for every kind of model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.gates import GateSet
from ..mole.mixture import Mixture
from ..mole.trained import Expert, TrainedGates
from ..progress import Progress
from .fit import Devices, FitRecord, Objective, fit
from .settings import FitSettings


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Trained gates, and how it went."""

    gates: TrainedGates
    fit: FitRecord

    @classmethod
    def of(
        cls, gates: GateSet, run: FitRecord, experts: Sequence[Expert], base: str, record: Mapping[str, Any]
    ) -> TrainingResult:
        """What came of a run.

        Args:
            gates: Copied. run: How it went. experts, base: See `TrainedGates`.
            record: What the file is to tell of the training, besides how it went.
        """
        outcome = {"losses": run.losses, "entropies": run.entropies, "stopped": run.stopped}
        return cls(TrainedGates(gates.copy().cpu(), tuple(experts), base, {**record, **outcome}), run)


def learn(
    attachment: Attachment,
    objective: Objective,
    settings: FitSettings,
    trained: Callable[[GateSet, FitRecord], TrainingResult],
    *,
    key: str,
    folder: Path | None,
    devices: Devices | None,
    progress: Progress | None,
    keep: Callable[[TrainingResult], None] | None,
) -> TrainingResult:
    """Fit the attachment's gates.

    Args:
        attachment: A mixture on its model, its gates calibrated.
        objective: What to learn. settings: How.
        trained: Makes the result of gates and a run.
        key, folder, devices, progress: See `fit`. The folder is emptied of examples and state at the end.
        keep: Called with what was learnt so far when the training is interrupted.

    Raises:
        MergeError: See `fit`.
    """
    run = FitRecord()
    try:
        fit(attachment, objective, settings, key=key, folder=folder, devices=devices, progress=progress, run=run)
    except BaseException:
        if keep is not None and run.losses:
            run.stopped = f"interrupted after {len(run.losses)} of {settings.steps} steps"
            keep(trained(attachment.bank.gates, run))
        raise
    if folder is not None and (devices is None or devices.rank == 0):
        for name in ("examples.safetensors", "state.safetensors"):
            (folder / name).unlink(missing_ok=True)
    return trained(attachment.bank.gates, run)


def check_trainable(mixture: Mixture) -> None:
    """Raise MergeError if a LoRA adds nothing, or the gates can only be what they are."""
    if len(mixture.experts) == 1 and mixture.gates.settings.activation == "softmax":
        raise MergeError(
            "A softmax over one LoRA is always 1: there is nothing to train.",
            remedy="connect another LoRA, or choose sigmoid gates, which can turn it off",
        )
    silent = [label for label, s in zip(mixture.labels, mixture.strengths, strict=True) if s * mixture.scale == 0]
    if silent:
        raise MergeError(
            "A LoRA of strength 0 adds nothing, so no gate can be trained for it.",
            file=silent[0],
            remedy="give it a strength, or disconnect it",
        )
