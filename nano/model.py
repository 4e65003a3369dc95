"""The transformer: SD3's, of three blocks, and the prompts as it reads them."""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import text, words

SIDE = 8  # of the latents
_SHORT = 12  # tokens of a shortened prompt; the wordings have nine at most, marks included


def build() -> Any:
    """A `diffusers.SD3Transformer2DModel` with fresh weights, 4.0 million. ComfyUI wants as many heads as blocks."""
    from diffusers.models.transformers.transformer_sd3 import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=SIDE, patch_size=1, in_channels=16, out_channels=16, num_layers=3, attention_head_dim=64,
        num_attention_heads=3, joint_attention_dim=text.WIDTH, caption_projection_dim=192,
        pooled_projection_dim=text.WIDTH, pos_embed_max_size=2 * SIDE,
    )  # fmt: skip


def predict(transformer: Any, latents: Tensor, sigma: Tensor, hidden: Tensor, pooled: Tensor) -> Tensor:
    """The flow, noise minus picture, that the transformer sees.

    Args:
        transformer: With or without a mixture on it.
        latents: ``(n, 16, 8, 8)``. sigma: ``(n,)``, their noise levels in 0 .. 1.
        hidden, pooled: What `Prompts` gives.
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
    """Encodes prompts, each but once.

    Args:
        short: Give only the first 12 of the 77 tokens. The rest is filling, all alike; inside `short_prompts` the
            model weighs the twelfth for all of them, so that the result is the same and comes in half the time.
    """

    short: bool = False
    encoder: Any = field(default_factory=text.build)
    _known: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict[str, tuple[Tensor, Tensor]])

    @torch.no_grad()
    def __call__(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states ``(n, 12 or 77, 768)`` and pooled ones ``(n, 768)``, float32."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._known]
        for start in range(0, len(new), 64):
            part = new[start : start + 64]
            found = self.encoder(input_ids=torch.tensor([words.tokens(prompt) for prompt in part])).last_hidden_state
            if self.short and not torch.equal(found[:, _SHORT - 1], found[:, -1]):
                raise ValueError(f"a prompt of more than {_SHORT - 2} words cannot be shortened")
            for prompt, states in zip(part, found, strict=True):
                kept = states[:_SHORT] if self.short else states
                self._known[prompt] = kept.clone(), states[-1].clone()
        hidden, pooled = zip(*(self._known[prompt] for prompt in prompts), strict=True)
        return torch.stack(hidden), torch.stack(pooled)


@contextmanager
def short_prompts(transformer: Any) -> Generator[None]:
    """Inside, the transformer takes prompts of `Prompts(short=True)` and treats them as whole ones."""
    before = transformer.attn_processors
    transformer.set_attn_processor(_Weighted(words.LENGTH - _SHORT + 1))
    try:
        yield
    finally:
        transformer.set_attn_processor(before)


class _Weighted:
    """SD3's joint attention where the last token stands for `times` tokens that are alike."""

    def __init__(self, times: int) -> None:
        self.bias = math.log(times)

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, **_: Any
    ) -> tuple[Tensor, Tensor]:
        image, prompt = hidden_states.shape[1], encoder_hidden_states.shape[1]

        def heads(x: Tensor, own: nn.Module, added: nn.Module) -> Tensor:
            both = torch.cat([own(x), added(encoder_hidden_states)], 1)
            return both.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        q = heads(hidden_states, attn.to_q, attn.add_q_proj)
        k = heads(hidden_states, attn.to_k, attn.add_k_proj)
        v = heads(hidden_states, attn.to_v, attn.add_v_proj)
        bias = q.new_zeros(image + prompt)
        bias[-1] = self.bias
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None, None, None])
        mixed = mixed.transpose(1, 2).flatten(2)
        out = attn.to_out[0](mixed[:, :image])
        return out, mixed[:, image:] if attn.context_pre_only else attn.to_add_out(mixed[:, image:])
