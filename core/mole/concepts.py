"""Concept detector: which experts' concepts a text conditioning names, read token by token.

A gate that reads the mean over a text's tokens closes when a few words are added, because each word's share shrinks.
The detector scores every token by itself and takes the largest score, so that other words do not count.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import MergeError

_TEMPERATURE = 0.5  # of the smooth maximum over tokens, in logits
# Models' names for the mask of their text conditioning, (B, T).
_MASK_ARGUMENTS = ("attention_mask", "encoder_attention_mask", "encoder_hidden_states_mask", "text_embedding_mask")


class ConceptDetector(nn.Module):
    """Scores of the experts' concepts for a text: text states ``(B, T, F)`` to presence ``(B, N)``, 0 .. 1.

    ``presence_i = sigmoid(smoothmax_t(w_i . x_t / rms(x_t) + b_i))`` over the tokens `t` that are not padding. The
    smooth maximum of logits is their mean weighted by ``softmax(logits / 0.5)``: it never exceeds the largest one and
    does not grow with the number of tokens, as ``logsumexp`` would. Dividing by the root mean square makes a token's
    score independent of prompt weights such as ``(heart:1.2)``.

    Args:
        weight: ``(N, F)`` float32. bias: ``(N,)`` float32.
        words: Per expert, the words or phrases that name its concept.

    Raises:
        MergeError: Shapes that do not fit together.
    """

    weight: Tensor
    bias: Tensor

    def __init__(self, weight: Tensor, bias: Tensor, words: Sequence[Sequence[str]]) -> None:
        super().__init__()
        self.words = tuple(tuple(names) for names in words)
        if weight.ndim != 2 or tuple(bias.shape) != weight.shape[:1] or len(self.words) != len(weight):
            raise MergeError(
                "A concept detector needs a weight, a bias and words for every LoRA.",
                expected=f"{len(self.words)} rows",
                found=f"weight {tuple(weight.shape)}, bias {tuple(bias.shape)}",
            )
        self.register_buffer("weight", weight.float())
        self.register_buffer("bias", bias.float())

    @property
    def features(self) -> int:
        """Width `F` of the text conditioning."""
        return self.weight.shape[1]

    def forward(self, text: Tensor, mask: Tensor | None = None) -> Tensor:
        """Presence ``(B, N)`` float32 of each concept in each text.

        Args:
            text: ``(B, T, F)``, any floating dtype.
            mask: ``(B, T)`` bool, false for padding. Tokens of zeros are padding too.

        Raises:
            MergeError: A text conditioning of another width.
        """
        logits, is_token = self.token_logits(text, mask)
        return torch.sigmoid(smooth_maximum(logits, is_token[..., None])).float()

    def token_logits(self, text: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Score ``(B, T, N)`` of each concept at every token, and whether it is a token ``(B, T)``; see `forward`."""
        if text.shape[-1] != self.features:
            raise MergeError(
                "The gates read a text conditioning of another width than they were made for.",
                expected=f"{self.features} features",
                found=text.shape[-1],
                remedy="use the gates with the base model and the text encoders they were made for",
            )
        x = at_least_float32(text)
        square = x.square().mean(-1)
        logits = nn.functional.linear(x, self.weight.to(x)) * square.clamp_min(1e-12).rsqrt()[..., None]  # (B, T, N)
        is_token = (square > 0) if mask is None else (square > 0) & mask
        return logits + self.bias.to(x), is_token

    def select(self, keep: Sequence[int]) -> ConceptDetector:
        """The detector of these experts' concepts, in this order."""
        rows = list(keep)
        detector = ConceptDetector(self.weight.cpu()[rows], self.bias.cpu()[rows], [self.words[i] for i in rows])
        return detector.to(self.weight.device)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or in its own dtype if that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def smooth_maximum(logits: Tensor, valid: Tensor) -> Tensor:
    """Mean over dimension 1 weighted by ``softmax(logits / temperature)``, of the valid entries only.

    Args:
        logits: ``(B, T, ..)``. valid: bool, broadcasts with `logits`.

    Returns:
        ``(B, ..)``; a very negative number where nothing is valid.
    """
    masked = logits.masked_fill(~valid, torch.finfo(logits.dtype).min / 2)  # finite, so that its share of 0 adds 0
    return ((masked / _TEMPERATURE).softmax(1) * masked).sum(1)


def text_mask(arguments: Mapping[str, Any], text: Tensor) -> Tensor | None:
    """The tokens of a text conditioning ``(B, T, F)`` that are not padding, from a model's keyword arguments.

    Returns:
        ``(B, T)`` bool; ``None`` if the model got no mask for these tokens. Understands masks of bools, of 0 and 1, and
        additive ones (0 and a large negative number).
    """
    for name in _MASK_ARGUMENTS:
        mask: Any = arguments.get(name)
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] == text.shape[1]:
            return (mask == mask.amax()).to(text.device)
    return None
