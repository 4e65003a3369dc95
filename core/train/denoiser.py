"""What gate training asks of a program that runs a diffusion model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Denoiser(Protocol):
    """A diffusion model with the mixture on it, its prompts already encoded. Prompts are told by their numbers."""

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        """Clean latents ``(B, ..)``, one per prompt, painted by the model as it stands. The same seed, the same."""
        ...

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """Latents at times ``t (B,)`` in 0 .. 1 (0 clean, 1 noise), with ``noise`` of the latents' shape."""
        ...

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What a perfect model would predict there."""
        ...

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        """What the model predicts: noise or velocity, on a scale on which errors at all times count alike."""
        ...

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        """The clean latents a prediction implies."""
        ...
