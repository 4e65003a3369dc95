"""accelerate: several processes that train one set of gates together."""

from __future__ import annotations

import os

from accelerate.accelerator import Accelerator
from torch import Tensor


class AcceleratorDevices:
    """Implements `core.train.Devices`. Each process takes its share of every batch; rank 0 alone writes files.

    Args:
        accelerator: Of this process. Models need not be prepared by it: gates are what is shared.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    @classmethod
    def launched(cls, *, cpu: bool = False) -> AcceleratorDevices | None:
        """Of the processes that ``accelerate launch`` started; ``None`` in a process of its own.

        Args:
            cpu: Compute on the CPU even where there is something faster.
        """
        return cls(Accelerator(cpu=cpu)) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, where the tensor is."""
        mean: Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "mean")  # type: ignore[assignment]
        return mean.to(tensor.device)
