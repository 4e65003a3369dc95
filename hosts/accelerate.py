"""accelerate: train one set of gates in several processes."""

from __future__ import annotations

import os

from accelerate.accelerator import Accelerator
from torch import Tensor


class AcceleratorDevices:
    """Implements `core.train.Devices`: each process takes its share of every batch; only rank 0 writes files.

    Args:
        accelerator: The accelerator of this process. The models need not be prepared by it: only gradients of gates are
            exchanged.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self.accelerator = accelerator
        self.rank, self.world = accelerator.process_index, accelerator.num_processes

    @classmethod
    def launched(cls, *, cpu: bool = False) -> AcceleratorDevices | None:
        """The devices of all processes that ``accelerate launch`` started.

        Args:
            cpu: Compute on the CPU even if an accelerator is available.

        Returns:
            ``None`` in a process that was not started by it, or alone.
        """
        return cls(Accelerator(cpu=cpu)) if int(os.environ.get("WORLD_SIZE", "1")) > 1 else None

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean of a tensor over all processes, on the tensor's device."""
        mean: Tensor = self.accelerator.reduce(tensor.to(self.accelerator.device), "mean")  # type: ignore[assignment]
        return mean.to(tensor.device)
