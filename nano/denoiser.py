"""The small model behind the interfaces of `core.train`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ..core.train.detector import EncodedPrompt
from . import words
from .model import SIDE, Prompts, predict
from .sampling import noise, sample
from .vae import CHANNELS


class NanoPromptEncoder:
    """Implements `core.train.PromptEncoder`.

    Args:
        prompts: Prompt encoder, best with `any_words`: detectors are fitted on prompts with words of all kinds.
    """

    def __init__(self, prompts: Prompts) -> None:
        self.prompts = prompts

    def encode(self, prompt: str) -> EncodedPrompt:
        return EncodedPrompt(self.prompts([prompt])[0][0], None, {"clip": 0})

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {"clip": words.tokens(prompt, any_words=self.prompts.any_words)}


class NanoDenoiser:
    """Implements `core.train.Denoiser`.

    Args:
        transformer: Transformer, with or without a mixture attached.
        texts: Prompts, addressed by their index.
        prompts: Prompt encoder with `short` off, because gates read all 77 tokens.
        width: Width of the latents.
        channels: Channels of the latents.
    """

    def __init__(
        self, transformer: Any, texts: Sequence[str], prompts: Prompts, *, width: int = SIDE, channels: int = CHANNELS
    ) -> None:
        self.transformer, self.texts, self.prompts, self.width = transformer, list(texts), prompts, width
        self.channels = channels

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        texts = [self.texts[i] for i in prompts]
        return sample(
            self.transformer, self.prompts, texts, seed, guidance=1.0, width=self.width, channels=self.channels
        )

    def noise(self, batch: int, seed: int) -> Tensor:
        return noise(batch, seed, width=self.width, channels=self.channels)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1)
        return (1 - t) * latents + t * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return predict(self.transformer, noisy, t, *self.prompts([self.texts[i] for i in prompts]))

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t.view(-1, 1, 1, 1) * prediction
