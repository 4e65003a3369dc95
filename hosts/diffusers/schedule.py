"""What times mean to diffusers' schedulers: how much noise there is, and what the model predicts then."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from ...core.errors import MergeError

_FLOW = "FlowMatchEulerDiscreteScheduler"


class Schedule(Protocol):
    """What a time in 0 .. 1 means to a scheduler: its share of the way from clean to noise.

    ``x_t = a x + b n``, and the model predicts ``c n + d x``.
    """

    def timestep(self, t: Tensor) -> Tensor:
        """What the model is told, in thousandths."""
        ...

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``a, b, c, d``, each ``(B,)`` float32."""
        ...


class _Flow:
    """``x_t = (1 - s) x + s n``; predicted is the velocity ``n - x``. Time runs as it does for the sampler."""

    def __init__(self, scheduler: Any, tokens: int) -> None:
        config = scheduler.config
        shift: dict[str, float] = {}
        if config.get("use_dynamic_shifting"):
            names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
            names |= {"base_shift": "base_shift", "max_shift": "max_shift"}
            given = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
            shift["mu"] = calculate_shift(tokens, **given)
        own = type(scheduler).from_config(config)
        if type(own).__name__ == _FLOW:  # left to itself it would shift the last step twice
            own.set_timesteps(sigmas=(torch.arange(1000, 0, -1) / 1000).tolist(), device="cpu", **shift)
        else:
            own.set_timesteps(1000, device="cpu", **shift)
        self.sigmas = own.sigmas.float().flip(0)  # from 0 to 1

    def _sigma(self, t: Tensor) -> Tensor:
        place = t.float().clamp(0, 1) * (len(self.sigmas) - 1)
        low = place.long().clamp(max=len(self.sigmas) - 2)
        table = self.sigmas.to(t.device)
        return torch.lerp(table[low], table[low + 1], place - low)

    def timestep(self, t: Tensor) -> Tensor:
        return 1000 * self._sigma(t)

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, one = self._sigma(t), torch.ones_like(t, dtype=torch.float32)
        return 1 - s, s, one, -one


class _Diffusion:
    """``x_t = a x + b n`` with ``a^2 + b^2 = 1``; predicted is the noise `n`, or ``v = a n - b x``."""

    def __init__(self, scheduler: Any) -> None:
        self.alphas: Tensor = scheduler.alphas_cumprod.float().cpu()
        self.velocity = scheduler.config.prediction_type == "v_prediction"

    def timestep(self, t: Tensor) -> Tensor:
        steps = len(self.alphas)
        return ((t.float() * steps).round().long() - 1).clamp(0, steps - 1)

    def mix(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha = self.alphas.to(t.device)[self.timestep(t)]
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        return (a, b, a, -b) if self.velocity else (a, b, torch.ones_like(a), torch.zeros_like(a))


def schedule_of(scheduler: Any, tokens: int) -> Schedule:
    """The schedule of a pipeline's scheduler, which is only looked at.

    Args:
        scheduler: Flow matching, or one that predicts noise or v.
        tokens: Of a picture, for a shift that depends on its size.

    Raises:
        MergeError: A scheduler of another kind.
    """
    kind, config = type(scheduler).__name__, scheduler.config
    if kind == _FLOW or config.get("use_flow_sigmas"):
        return _Flow(scheduler, tokens)
    if hasattr(scheduler, "alphas_cumprod") and config.get("prediction_type") in ("epsilon", "v_prediction"):
        return _Diffusion(scheduler)
    raise MergeError(
        "Gates cannot be trained with this scheduler.",
        expected=f"{_FLOW}, or one that predicts noise or v (DDIM, Euler, DPM++, ..)",
        found=f"{kind}, prediction type {config.get('prediction_type', 'unknown')}",
        remedy="give the pipeline one of these schedulers to train the gates; they work with any afterwards",
    )
