"""How far a pipeline's sampling has come, for experts that act in a part of its steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ...core.mole.regions.picture import AttentionObserver, Part, Picture

_ROUNDING = 1e-6


class PipelineSteps:
    """Implements `SamplingReader` with the timesteps of a pipeline's scheduler.

    A step's fraction is its number over the number of steps: of four steps they begin at 0, 0.25, 0.5 and 0.75. Image
    to image pipelines, which leave out the first steps, count those too.

    Args:
        pipe: The pipeline.
    """

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def parts(self, arguments: Mapping[str, Any], picture: Picture) -> Sequence[Part] | None:
        return None

    def reached(self, fraction: float, args: Sequence[Any], arguments: Mapping[str, Any]) -> bool:
        scheduler = self.pipe.scheduler
        return self.step(args, arguments) >= fraction * len(scheduler.timesteps) - _ROUNDING

    def watch_attention(self, arguments: Mapping[str, Any], read: AttentionObserver) -> None:
        return None

    def step(self, args: Sequence[Any], arguments: Mapping[str, Any]) -> int:
        scheduler = self.pipe.scheduler
        if hasattr(scheduler, "step_index"):
            step = scheduler.step_index  # none before the first step
            return int(step if step is not None else scheduler.begin_index or 0)
        timestep: Any = arguments.get("timestep", args[1] if len(args) > 1 else None)
        timestep = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        return int((scheduler.timesteps.float() - float(timestep)).abs().argmin())
