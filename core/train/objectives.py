"""Objectives of a diffusion model's gates: predictions made earlier (distillation, denoising), or a CLIP model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .denoiser import Denoiser
from .examples import Examples
from .prompts import Prompt


class Regression:
    """Mean squared error to the examples' targets: for distillation, and for denoising of given images."""

    def __init__(self, denoiser: Denoiser, examples: Examples) -> None:
        self.denoiser, self.examples, self.size = denoiser, examples, len(examples)

    def loss(self, indices: Sequence[int]) -> Tensor:
        e = self.examples
        prediction = self.denoiser.predict(e.noisy[indices], e.t[indices], e.prompt[indices].tolist())
        return (prediction.float() - e.target[indices].to(prediction.device).float()).square().mean()


class Clip(Protocol):
    """A CLIP model that embeds latents and texts."""

    def images(self, latents: Tensor) -> Tensor:
        """Unit image embeddings ``(B, F)`` of clean latents, differentiable."""
        ...

    def texts(self, texts: Sequence[str]) -> Tensor:
        """Unit text embeddings ``(B, F)``."""
        ...


class ClipGuidance:
    """CLIP guidance, ``L_D = L_global + L_local``.

    ``L_global`` is ``1 - cos(image, prompt)``, ``L_local`` the mean of ``1 - cos(image, concept)`` over the concepts
    that the prompt names. The image is the clean one that the gated model's prediction implies.

    Args:
        denoiser: Runs the model. examples: Their targets are not used.
        prompts: The denoiser's prompts.
        concepts: Per expert, the words that name it.
        clip: The CLIP model.

    Source: arXiv:2404.13628, section 3.2 (training objective).
    """

    def __init__(
        self,
        denoiser: Denoiser,
        examples: Examples,
        prompts: Sequence[Prompt],
        concepts: Sequence[Sequence[str]],
        clip: Clip,
    ) -> None:
        # prompts that name no concept carry no information about the experts
        self.rows = [i for i, p in enumerate(examples.prompt.tolist()) if prompts[p].named]
        self.denoiser, self.examples, self.clip, self.size = denoiser, examples, clip, len(self.rows)
        self.prompts = prompts
        self.concepts: Sequence[Sequence[str]] = concepts

    def loss(self, indices: Sequence[int]) -> Tensor:
        e, rows = self.examples, [self.rows[i] for i in indices]
        prompt = e.prompt[rows].tolist()
        prediction = self.denoiser.predict(e.noisy[rows], e.t[rows], prompt)
        clean = self.denoiser.clean(e.noisy[rows].to(prediction.device), e.t[rows].to(prediction.device), prediction)
        image = self.clip.images(clean)
        L_global = 1 - (image * self.clip.texts([self.prompts[p].text for p in prompt]).to(image)).sum(-1)
        L_local: list[Tensor] = []
        for row, p in enumerate(prompt):
            words = self.clip.texts([str(self.concepts[i][0]) for i in self.prompts[p].named]).to(image)
            L_local.append((1 - words @ image[row]).mean())
        return L_global.mean() + torch.stack(L_local).mean()
