"""Noise schedules of diffusers' schedulers: the share of noise at a time, and what the model predicts there."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from torch import Tensor

from ...core.errors import MergeError

_FLOW = "FlowMatchEulerDiscreteScheduler"


class Schedule(Protocol):
    """Noise schedule over times from 0 (clean) to 1 (noise).

    With clean latents `x` and noise `n`, noisy latents are ``x_t = a x + b n`` and the model predicts ``c n + d x``.
    """

    def timestep(self, t: Tensor) -> Tensor:
        """The model's timesteps ``(B,)``, 0 to 1000, for times ``(B,)``."""
        ...

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``a, b, c, d``, each ``(B,)`` float32, at times ``(B,)``."""
        ...


class _Flow:
    """Flow matching: ``x_t = (1 - s) x + s n``; predicts the velocity ``n - x``. `s` over time as in sampling."""

    def __init__(self, scheduler: Any, tokens: int) -> None:
        config = scheduler.config
        shift: dict[str, float] = {}
        if config.get("use_dynamic_shifting"):
            names = {"base_seq_len": "base_image_seq_len", "max_seq_len": "max_image_seq_len"}
            names |= {"base_shift": "base_shift", "max_shift": "max_shift"}
            arguments = {ours: config[theirs] for ours, theirs in names.items() if theirs in config}
            shift["mu"] = calculate_shift(tokens, **arguments)
        copy = type(scheduler).from_config(config)
        if type(copy).__name__ == _FLOW:  # with its default sigmas it would shift the last step twice
            copy.set_timesteps(sigmas=(torch.arange(1000, 0, -1) / 1000).tolist(), device="cpu", **shift)
        else:
            copy.set_timesteps(1000, device="cpu", **shift)
        self.sigmas = copy.sigmas.float().flip(0)  # from 0 to 1

    def _sigma(self, t: Tensor) -> Tensor:
        position = t.float().clamp(0, 1) * (len(self.sigmas) - 1)
        low = position.long().clamp(max=len(self.sigmas) - 2)
        sigmas = self.sigmas.to(t.device)
        return torch.lerp(sigmas[low], sigmas[low + 1], position - low)

    def timestep(self, t: Tensor) -> Tensor:
        return 1000 * self._sigma(t)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        s, one = self._sigma(t), torch.ones_like(t, dtype=torch.float32)
        return 1 - s, s, one, -one


class _Diffusion:
    """Diffusion: ``x_t = a x + b n`` with ``a^2 + b^2 = 1``; predicts the noise `n`, or ``v = a n - b x``."""

    def __init__(self, scheduler: Any) -> None:
        self.alphas: Tensor = scheduler.alphas_cumprod.float().cpu()
        self.velocity = scheduler.config.prediction_type == "v_prediction"

    def timestep(self, t: Tensor) -> Tensor:
        steps = len(self.alphas)
        return ((t.float() * steps).round().long() - 1).clamp(0, steps - 1)

    def coefficients(self, t: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        alpha = self.alphas.to(t.device)[self.timestep(t)]
        a, b = alpha.sqrt(), (1 - alpha).sqrt()
        return (a, b, a, -b) if self.velocity else (a, b, torch.ones_like(a), torch.zeros_like(a))


def noise_schedule(scheduler: Any, tokens: int) -> Schedule:
    """Read the noise schedule of a pipeline's scheduler. The scheduler stays unchanged.

    Args:
        scheduler: A scheduler for flow matching, or for a model that predicts noise or v.
        tokens: Number of tokens per image, for a shift that depends on the image size.

    Raises:
        MergeError: The scheduler is of another kind.
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
        remedy="train the gates with one of these schedulers; trained gates work with any",
    )
