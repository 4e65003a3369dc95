"""What gates can learn from: cached predictions (distillation, denoising), or a CLIP model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

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


class Guidance:
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


class NextToken:
    """The language model loss on a few texts per adapter, and staying near the base model on texts of none of them.

    Args:
        logits: The gated model: token ids ``(B, T)`` to logits ``(B, T, vocabulary)``.
        texts: Token ids ``(T,)``, each of at least two tokens.
        base: For texts that are to stay as the base model has them, its logits ``(T, vocabulary)``; ``None`` for texts
            to be learnt. The loss there is the Kullback-Leibler divergence from them.
    """

    def __init__(
        self, logits: Callable[[Tensor], Tensor], texts: Sequence[Tensor], base: Sequence[Tensor | None] | None = None
    ) -> None:
        self.logits, self.texts, self.size = logits, texts, len(texts)
        self.base = base if base is not None else [None] * len(texts)

    def loss(self, indices: Sequence[int]) -> Tensor:
        losses: list[Tensor] = []
        for i in indices:  # one at a time: lengths differ, and padding is the tokenizer's business
            found, wanted = self.logits(self.texts[i][None])[0].float(), self.base[i]
            if wanted is None:
                losses.append(nn.functional.cross_entropy(found[:-1], self.texts[i][1:].to(found.device)))
            else:
                log_p = wanted.to(found).log_softmax(-1)
                losses.append(
                    nn.functional.kl_div(found.log_softmax(-1), log_p, log_target=True, reduction="batchmean")
                )
        return torch.stack(losses).mean()
