"""Interface to a host that runs a diffusion model, for training gates and measuring layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A diffusion model with the mixture on it, and a list of encoded prompts, which are passed by index."""

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        """Sample clean latents ``(B, ..)``, one per prompt, with the model as it is. Equal seeds give equal latents."""
        ...

    def noise(self, batch: int, seed: int) -> Tensor:
        """Standard normal noise in the shape of latents, ``(batch, ..)``. Equal seeds give equal noise."""
        ...

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Latents at times ``t (B,)`` in 0 .. 1 (0 clean, 1 noise), with ``noise`` of the latents' shape."""
        ...

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """The prediction of a perfect model for `noised` with the same arguments."""
        ...

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        """The model's prediction: noise or velocity, scaled so that errors at all times count equally."""
        ...

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents that a prediction implies."""
        ...
