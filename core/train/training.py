"""What training gates has in common for every kind of model: the record, the state folder, the result."""

from __future__ import annotations

from collections.abc import Callable, Mapping
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
from .state import STATE_FILE, read_state

EXAMPLES_FILE = "examples.safetensors"  # in the folder of an unfinished training


@dataclass(frozen=True, eq=False)
class TrainingResult:
    """Trained gates, and the record of the fit."""

    gates: TrainedGates
    fit: FitRecord


class TrainingRun:
    """One training of a mixture's gates.

    Args:
        attachment: The mixture on its model. mixture: The same mixture.
        settings: Settings of the fit.
        record: Settings and training data as JSON data, for the gates' file.
        base: The kind of model, for the gates' file.
        identity: Anything else that distinguishes this training from others.
        folder: Folder for the state; ``None`` keeps none.
        devices, progress: See `fit`.
        keep: Called with the result so far if the training is interrupted.

    Attributes:
        description: Everything that distinguishes this training from others, except its data, as JSON data.
    """

    def __init__(
        self,
        attachment: Attachment,
        mixture: Mixture,
        settings: FitSettings,
        record: Mapping[str, Any],
        *,
        base: str,
        identity: str,
        folder: Path | None,
        devices: Devices | None,
        progress: Progress | None,
        keep: Callable[[TrainingResult], None] | None,
    ) -> None:
        self.attachment, self.settings, self.base = attachment, settings, base
        self.folder, self.devices, self.progress, self.keep = folder, devices, progress, keep
        self.experts = tuple(Expert.of(adapter) for adapter in mixture.experts)
        self.record = {**record, "strengths": [strength * mixture.scale for strength in mixture.strengths]}
        hashes = [expert.sha256 for expert in self.experts]
        gates = mixture.gates.settings.model_dump()
        self.description: list[Any] = [self.record, hashes, gates, mixture.mixing, base, identity]

    @property
    def writes_files(self) -> bool:
        """Whether this process writes to the folder: of several processes, only the first does."""
        return self.folder is not None and (self.devices is None or self.devices.rank == 0)

    def check_folder(self, key: str) -> None:
        """Raise FormatError if the folder holds the state of a training with another key."""
        if self.folder is not None:
            read_state(self.folder, key)

    def fit(self, objective: Objective, key: str) -> TrainingResult:
        """Fit the attachment's gates, and remove the state from the folder.

        Args:
            objective: What the gates learn.
            key: Identifies this training in the folder.

        Raises:
            MergeError: See `fit`.
            FormatError: The folder holds another training.
        """
        gates, record = self.attachment.bank.gates, FitRecord()
        try:
            fit(
                self.attachment, objective, self.settings,
                key=key, folder=self.folder, devices=self.devices, progress=self.progress, record=record,
            )  # fmt: skip
        except BaseException:
            if self.keep is not None and record.losses:
                record.stopped = f"interrupted after {len(record.losses)} of {self.settings.steps} steps"
                self.keep(self.result(gates, record))
            raise
        if self.folder is not None and self.writes_files:
            for name in (EXAMPLES_FILE, STATE_FILE):
                (self.folder / name).unlink(missing_ok=True)
        return self.result(gates, record)

    def result(self, gates: GateSet, record: FitRecord) -> TrainingResult:
        """The result with a copy of the gates on the CPU."""
        outcome = {"losses": record.losses, "entropies": record.entropies, "stopped": record.stopped}
        trained = TrainedGates(gates.copy().cpu(), self.experts, self.base, {**self.record, **outcome})
        return TrainingResult(trained, record)


def check_trainable(mixture: Mixture) -> None:
    """Raise MergeError if a LoRA adds nothing, or if the gates cannot change."""
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
