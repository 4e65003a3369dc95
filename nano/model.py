"""The transformer, SD3's with three blocks, and its prompt encoder."""

from __future__ import annotations

import copy
import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from . import text, words

SIDE = 8  # height and width of the latents
SHORT = 12  # tokens of a shortened prompt; the wordings have at most nine, start and end tokens included


def build() -> Any:
    """Build an untrained `diffusers.SD3Transformer2DModel` of 4.0 million weights.

    It has as many heads as blocks, because ComfyUI derives one from the other.
    """
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=64,
        num_attention_heads=3, joint_attention_dim=text.WIDTH, caption_projection_dim=192,
        pooled_projection_dim=text.WIDTH, pos_embed_max_size=2 * SIDE,
    )  # fmt: skip


def predict(transformer: Any, latents: Tensor, sigma: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """Predict the flow, noise minus clean latents.

    Args:
        transformer: Transformer, with or without a mixture attached.
        latents: Noisy latents ``(n, 16, 8, 8)``.
        sigma: Noise levels ``(n,)`` in 0 .. 1.
        hidden, pooled: Encoded prompts, see `Prompts`.
    """
    return transformer(
        hidden_states=latents,
        timestep=1000 * sigma,
        encoder_hidden_states=hidden,
        pooled_projections=pooled,
        return_dict=False,
    )[0]


@dataclass
class Prompts:
    """Prompt encoder with a cache.

    Args:
        short: Return only the first `tokens` of the 77 tokens. The others are padding with equal states; inside
            `short_prompts` the model weights the last token for all of them, which gives the same result in half the
            time.
        any_words: Accept words that the model was not trained on, see `words.tokens`.
        tokens: Number of tokens of a short prompt.
    """

    short: bool = False
    any_words: bool = False
    tokens: int = SHORT
    encoder: Any = field(default_factory=text.build)
    _cache: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])

    def __post_init__(self) -> None:
        if self.any_words:  # `encode` adds tokens, and others share the encoder
            self.encoder = copy.deepcopy(self.encoder)

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Return hidden states ``(n, tokens or 77, 768)`` and pooled states ``(n, 768)``, float32.

        Raises:
            ValueError: If a prompt has too many words to be shortened.
        """
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._cache]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            encoded = self.encode(torch.tensor([words.tokens(prompt, any_words=self.any_words) for prompt in part]))
            if self.short and not torch.equal(encoded[:, self.tokens - 1], encoded[:, -1]):
                raise ValueError(f"a prompt of more than {self.tokens - 2} words cannot be shortened")
            for prompt, states in zip(part, encoded, strict=True):
                kept = states[: self.tokens] if self.short else states
                self._cache[prompt] = kept.clone(), states[-1].clone()
        hidden, pooled = zip(*(self._cache[prompt] for prompt in prompts), strict=True)
        return torch.stack(hidden), torch.stack(pooled)

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """Return the hidden states ``(n, 77, 768)``, float32, of tokens ``(n, 77)``."""
        if self.any_words:
            text.add_tokens(self.encoder, tokens.flatten().tolist())
        return self.encoder(input_ids=tokens).last_hidden_state


@contextmanager
def short_prompts(transformer: Any, tokens: int = SHORT) -> Generator[None]:
    """Let the transformer accept short prompts of `tokens` tokens inside the block, as if they had all 77 tokens."""
    before = transformer.attn_processors
    transformer.set_attn_processor(_PaddedAttention(words.LENGTH - tokens + 1))
    try:
        yield
    finally:
        transformer.set_attn_processor(before)


class _PaddedAttention:
    """SD3's joint attention, in which the last token stands for `times` equal tokens."""

    def __init__(self, times: int) -> None:
        self.bias = math.log(times)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        image = hidden_states.shape[1]

        def heads(x: Tensor, own: nn.Module, added: nn.Module) -> Tensor:
            both = torch.cat([own(x), added(encoder_hidden_states)], 1)
            return both.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(hidden_states, attn.to_q, attn.add_q_proj)
        k = heads(hidden_states, attn.to_k, attn.add_k_proj)
        v = heads(hidden_states, attn.to_v, attn.add_v_proj)
        # for so few tokens this is faster on a CPU than fused attention, whose gradient is slow there
        scores = q @ k.mT * q.shape[-1] ** -0.5
        scores[..., -1] += self.bias
        mixed = (scores.softmax(-1).to(v.dtype) @ v).transpose(1, 2).flatten(2)
        out = attn.to_out[0](mixed[:, :image])
        return out, mixed[:, image:] if attn.context_pre_only else attn.to_add_out(mixed[:, image:])
