"""The text encoders: MiniLM, a pretrained one, and that of the small model. Long prompts become chunks of 77 tokens."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from legomole.core.train import EncodedPrompt
from legomole.nano.model import Prompts
from legomole.nano.words import END, START, tokens
from torch import Tensor

from ..llm.small.encoder import Encoder

LENGTH = 77  # tokens of a chunk, start and end tokens included
_WEIGHTED = re.compile(r"\(([^()]+):([\d.]+)\)")


class ChunkEncoder(ABC):
    """Implements `core.train.PromptEncoder` as hosts do: chunks of 77 tokens are encoded one by one and concatenated.

    ``(words:1.2)`` moves the states of these words away from those of the empty prompt, as in ComfyUI.

    Args:
        start, end, padding: Ids of the special tokens.
    """

    def __init__(self, start: int, end: int, padding: int) -> None:
        self.start, self.end, self.padding = start, end, padding
        self._cache: dict[str, EncodedPrompt] = {}

    @abstractmethod
    def word_ids(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""

    @abstractmethod
    def states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """States ``(n, 77, F)`` and mask ``(n, 77)`` of chunks ``(n, 77)``."""

    @torch.no_grad()
    def encode(self, prompt: str) -> EncodedPrompt:
        if prompt not in self._cache:
            chunks, weights = self._chunks(prompt)
            states, mask = self.states(torch.tensor(chunks))
            if any(weight != 1 for row in weights for weight in row):
                empty = self.states(torch.tensor(self._chunks("")[0]))[0]
                states = empty + (states - empty) * torch.tensor(weights)[..., None]
            flat = None if mask is None else mask.flatten()
            self._cache[prompt] = EncodedPrompt(states.flatten(0, 1), flat, {"text": 0})
        return self._cache[prompt]

    def token_ids(self, prompt: str) -> Mapping[str, Sequence[int]]:
        return {"text": [id for chunk in self._chunks(prompt)[0] for id in chunk]}

    def _chunks(self, prompt: str) -> tuple[list[list[int]], list[list[float]]]:
        """Ids and weights of the tokens by chunk; words that do not fit into a chunk begin the next one."""
        chunks: list[list[tuple[int, float]]] = [[]]
        for text, weight in weighted_parts(prompt):
            for word in text.split():
                of_word = self.word_ids(word)
                if len(chunks[-1]) + len(of_word) > LENGTH - 2:
                    chunks.append([])
                chunks[-1] += [(id, weight) for id in of_word]
        ids: list[list[int]] = []
        weights: list[list[float]] = []
        for chunk in chunks:
            rest = LENGTH - 2 - len(chunk)
            ids.append([self.start, *(id for id, _ in chunk), self.end, *[self.padding] * rest])
            weights.append([1.0, *(weight for _, weight in chunk), 1.0, *[1.0] * rest])
        return ids, weights


def weighted_parts(prompt: str) -> list[tuple[str, float]]:
    """Split a prompt at ``(words:weight)`` into texts with their weights."""
    parts: list[tuple[str, float]] = []
    position = 0
    for match in _WEIGHTED.finditer(prompt):
        parts += [(prompt[position : match.start()], 1.0), (match[1], float(match[2]))]
        position = match.end()
    return [(text, weight) for text, weight in [*parts, (prompt[position:], 1.0)] if text.strip()]


class MiniLM(ChunkEncoder):
    """all-MiniLM-L6-v2 with its attention mask.

    Raises:
        SystemExit: If the package with the weights is not installed.
    """

    def __init__(self) -> None:
        self.encoder = Encoder()
        tokenizer: Any = self.encoder.tokenizer
        super().__init__(tokenizer.cls_token_id, tokenizer.sep_token_id, tokenizer.pad_token_id)

    def word_ids(self, text: str) -> list[int]:
        return self.encoder.tokenizer(text, add_special_tokens=False)["input_ids"]

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        mask = ids != self.padding
        return self.encoder.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state, mask


class Nano(ChunkEncoder):
    """The small model's text encoder, which knows whole words and has no mask."""

    def __init__(self) -> None:
        super().__init__(START, END, END)
        self.prompts = Prompts(any_words=True)

    def word_ids(self, text: str) -> list[int]:
        ids = tokens(text, any_words=True)[1:]
        return ids[: ids.index(END)]

    def states(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.prompts.encode(ids), None
