"""Text encoders with random weights that lay out their tokens as ComfyUI and diffusers do."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from zlib import crc32

import torch
from legomole.core.train import EncodedPrompt
from torch import Tensor

START, END, PAD = 1, 2, 0
WIDTH = 256


@cache
def embedding(token: int, width: int, seed: int) -> Tensor:
    return torch.randn(width, generator=torch.Generator().manual_seed(1000 * token + seed))


def words(text: str) -> list[int]:
    """A token per word or punctuation mark."""
    return [10 + crc32(word.encode()) % 60_000 for word in re.findall(r"\w+|[^\w\s]", text.lower())]


def in_context(ids: Sequence[int], width: int, seed: int = 0) -> Tensor:
    """``(T, width)``: each token's embedding, with some of those before and behind it."""
    x = torch.stack([embedding(token, width, seed) for token in ids])
    before, behind = torch.zeros_like(x), torch.zeros_like(x)
    before[1:], behind[:-1] = x[:-1], x[1:]
    return x + 0.6 * before + 0.6 * behind


class Clip:
    """One CLIP: chunks of `length` tokens, each between a start and an end token and padded with end tokens.

    Args:
        length: Tokens of a chunk.
        truncates: Whether a prompt has one chunk only.
        name: Name of the tokenizer.
    """

    def __init__(self, length: int = 77, *, truncates: bool = False, name: str = "l") -> None:
        self.length, self.truncates, self.name = length, truncates, name

    def ids(self, prompt: str, padding: int = END) -> list[int]:
        tokens, size = words(prompt), self.length - 2
        chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)] or [[]]
        rows = [[START, *chunk, END] for chunk in (chunks[:1] if self.truncates else chunks)]
        return [token for row in rows for token in [*row, *[padding] * (self.length - len(row))]]

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {self.name: self.ids(prompt)}

    def encode(self, prompt: str) -> EncodedPrompt:
        return EncodedPrompt(in_context(self.ids(prompt), WIDTH), None, {self.name: 0})


class TwoClips(Clip):
    """CLIP-L and CLIP-G side by side, as in SDXL; the second one pads with another token."""

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {"l": self.ids(prompt), "g": self.ids(prompt, PAD)}

    def encode(self, prompt: str) -> EncodedPrompt:
        ids = self.token_ids(prompt)
        states = torch.cat([in_context(ids["l"], WIDTH // 4), in_context(ids["g"], 3 * WIDTH // 4, 1)], 1)
        return EncodedPrompt(states, None, {"l": 0, "g": 0})


class T5:
    """T5 padded to at least `length` tokens, as in Flux. The CLIP beside it is not in the text conditioning."""

    def __init__(self, length: int = 128) -> None:
        self.length = length

    def ids(self, prompt: str) -> list[int]:
        tokens = [*words(prompt), END]
        return [*tokens, *[PAD] * (self.length - len(tokens))]

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {"l": Clip().ids(prompt), "t5xxl": self.ids(prompt)}

    def encode(self, prompt: str) -> EncodedPrompt:
        return EncodedPrompt(in_context(self.ids(prompt), WIDTH), None, {"t5xxl": 0})


class ClipsAndT5(T5):
    """CLIP-L and CLIP-G side by side, zeros beside them, and T5 behind them, as in SD3."""

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {"l": Clip().ids(prompt), "g": Clip().ids(prompt, PAD), "t5xxl": self.ids(prompt)}

    def encode(self, prompt: str) -> EncodedPrompt:
        ids = self.token_ids(prompt)
        clips = torch.cat(
            [*(in_context(ids[name], WIDTH // 4) for name in "lg"), torch.zeros(len(ids["l"]), WIDTH // 2)], 1
        )
        states = torch.cat([clips, in_context(ids["t5xxl"], WIDTH, 2)])
        return EncodedPrompt(states, None, {"l": 0, "g": 0, "t5xxl": len(ids["l"])})


class LanguageModel:
    """A language model's states of a chat template around the prompt, without those of its system message.

    Args:
        multiple: The number of positions is a multiple of this; the mask leaves out the rest.
        padding: State of the positions that the mask leaves out.
    """

    def __init__(self, multiple: int = 1, padding: float = 0.0) -> None:
        self.multiple, self.padding = multiple, padding
        self.system, self.end = words("describe what the user wants . user :"), words("< end > assistant :")

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {"qwen": [*self.system, *words(prompt), *self.end]}

    def encode(self, prompt: str) -> EncodedPrompt:
        dropped = len(self.system)
        states = in_context(self.token_ids(prompt)["qwen"], WIDTH)[dropped:]
        length = -(-len(states) // self.multiple) * self.multiple
        mask = torch.arange(length) < len(states)
        padded = torch.cat([states, torch.full((length - len(states), WIDTH), self.padding)])
        return EncodedPrompt(padded, mask, {"qwen": -dropped})


class Unknown(Clip):
    """A text encoder whose tokens cannot be located in its conditioning."""

    def encode(self, prompt: str) -> EncodedPrompt:
        tokens = in_context(words(prompt) or [PAD], WIDTH)
        return EncodedPrompt(tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(0))], None, {})


ENCODERS = {
    "CLIP": Clip(), "CLIP, one chunk": Clip(truncates=True), "CLIP-L and CLIP-G": TwoClips(), "T5": T5(),
    "T5, longer": T5(512), "CLIPs and T5": ClipsAndT5(), "language model": LanguageModel(),
    "language model, padded": LanguageModel(8, 3.0), "unknown positions": Unknown(),
}  # fmt: skip
