"""Prompt encoder: token states of MiniLM, a sentence encoder of 22 million weights (arXiv:2002.10957)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from legomole.core.train.detector import EncodedPrompt
from torch import Tensor
from torch.nn import functional as F

from ..llm.small.encoder import Encoder

WIDTH = 384
LENGTH = 77  # tokens of a whole prompt, as many as CLIP's
SHORT = 24  # tokens of a short prompt, at least one of which is padding
_SCALE = 1.8  # gives the states a standard deviation of about 1


_encoder = cache(Encoder)


@dataclass
class ArtPrompts:
    """Prompt encoder with a cache, a stand-in for `nano.model.Prompts`.

    All positions after the prompt hold the same padding state, the end token's of an empty prompt.

    Args:
        short: Return only the first `tokens` of the 77 tokens, for models inside `short_prompts`.
        tokens: Number of tokens of a short prompt.
    """

    short: bool = False
    tokens: int = SHORT
    _cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return hidden states ``(n, tokens or 77, 384)`` and pooled states ``(n, 384)``, float32.

        Raises:
            ValueError: If a prompt is too long to be shortened.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(new), 64):
            self._encode(new[start : start + 64])
        hidden, pooled = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
        return torch.stack(hidden), torch.stack(pooled)

    def _encode(self, prompts: Sequence[str]) -> None:
        encoder = _encoder()
        # the empty prompt is encoded alongside for its end token
        batch = encoder.tokenizer([*prompts, ""], padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        longest = int(mask.sum(1).max())
        if self.short and longest >= self.tokens:
            raise ValueError(f"a prompt of {longest} tokens cannot be shortened to {self.tokens}")
        with torch.autocast("cpu", enabled=False):  # equal states in training and sampling
            states = encoder.model(**batch).last_hidden_state
        # sentence embeddings are the mean over tokens, of unit length
        means = (states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        pooled = WIDTH**0.5 * F.normalize(means, dim=1)
        whole = states[-1, 1].expand(len(states), LENGTH, WIDTH).clone()
        whole[:, : states.shape[1]][mask] = states[mask]
        for prompt, row, summary in zip(prompts, _SCALE * whole, pooled, strict=False):
            self._cache[prompt] = (row[: self.tokens] if self.short else row).clone(), summary.clone()


class ArtPromptEncoder:
    """Implements `core.train.PromptEncoder`."""

    def __init__(self, prompts: ArtPrompts) -> None:
        self.prompts = prompts

    def encode(self, prompt: str) -> EncodedPrompt:
        states = self.prompts([prompt])[0][0]
        return EncodedPrompt(states, None, {"minilm": 0})

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        ids = _encoder().tokenizer(prompt, truncation=True, max_length=LENGTH)["input_ids"]
        return {"minilm": [*ids, *[ids[-1]] * (LENGTH - len(ids))]}
