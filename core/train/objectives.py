"""What the gates of a diffusion model can learn from: cached predictions (distillation, denoising), or a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .denoiser import Denoiser
from .examples import Examples
from .prompts import Prompt


class Regression:
    """Mean squared error to the examples' targets: distillation, and denoising of given images."""

    def __init__(self, denoiser: Denoiser, examples: Examples) -> None:
        self.denoiser, self.examples, self.size = denoiser, examples, len(examples)

    def loss(self, indices: Sequence[int]) -> Tensor:
        e = self.examples
        prediction = self.denoiser.predict(e.noisy[indices], e.t[indices], e.prompt[indices].tolist())
        return (prediction.float() - e.target[indices].to(prediction.device).float()).square().mean()


class Clip(Protocol):
    """A CLIP model and the way to it from latents."""

    def images(self, latents: Tensor) -> Tensor:
        """Unit image embeddings ``(B, F)`` of clean latents, differentiable."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings ``(B, F)``."""
        ...


class ClipGuidance:
    """CLIP guidance: ``1 - cos(image, prompt)`` (global) plus the mean of ``1 - cos(image, concept)`` (local).

    The image is the clean one that the gated model's prediction implies.

    Args:
        denoiser: Runs the model. examples: Their targets are not used.
        prompts: As the denoiser has them. concepts: Per expert, the words that name it.
        clip: The CLIP model.

    Source: arXiv:2404.13628, section 3.2 (training objective); the paper's L_D = L_global + L_local.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        examples: Examples,
        prompts: Sequence[Prompt],
        concepts: Sequence[Sequence[str]],
        clip: Clip,
    ) -> None:
        # a prompt that names nothing says nothing about the experts
        self.rows = [i for i, p in enumerate(examples.prompt.tolist()) if prompts[p].named]
        self.denoiser, self.examples, self.clip, self.size = denoiser, examples, clip, len(self.rows)
        self.prompts = prompts
        self.concepts: Sequence[Sequence[str]] = concepts

    def loss(self, indices: Sequence[int]) -> Tensor:
        e, rows = self.examples, [self.rows[i] for i in indices]
        numbers = e.prompt[rows].tolist()
        prediction = self.denoiser.predict(e.noisy[rows], e.t[rows], numbers)
        clean = self.denoiser.clean(e.noisy[rows].to(prediction.device), e.t[rows].to(prediction.device), prediction)
        image = self.clip.images(clean)
        whole = 1 - (image * self.clip.texts([self.prompts[p].text for p in numbers]).to(image)).sum(-1)
        local: list[Tensor] = []
        for row, p in enumerate(numbers):
            concepts = [str(self.concepts[i][0]) for i in self.prompts[p].named]
            words = self.clip.texts(concepts).to(image)
            local.append((1 - words @ image[row]).mean())
        return whole.mean() + torch.stack(local).mean()
