"""Models on which a map's effect is known at every position."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models import FEATURES, D, seeded


class CrossAttention(nn.Module):
    def __init__(self, d: int, features: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = nn.Linear(d, d), nn.Linear(features, d), nn.Linear(features, d)
        self.to_out = nn.Linear(d, d)

    def forward(self, x: Tensor, context: Tensor, scale_by_position: Tensor | None = None) -> Tensor:
        q = self.to_q(x)
        if scale_by_position is not None:
            q = q * scale_by_position[:, None]
        y = nn.functional.scaled_dot_product_attention(q, self.to_k(context), self.to_v(context))
        return self.to_out(y)


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.emb, self.attn2, self.ff = nn.Linear(FEATURES, d), CrossAttention(d, FEATURES), nn.Linear(d, d)

    def forward(self, x: Tensor, context: Tensor, rope: Tensor | None) -> Tensor:
        x = x + self.emb(context.mean(1))[:, None]
        x = x + self.attn2(x, context=context, scale_by_position=rope)
        return x + torch.tanh(self.ff(x))


class ByPosition(nn.Module):
    """A model ``(B, 2, H, W)`` whose output at a position depends on the latent there and on the text alone.

    Args:
        rope: Whether the attention gets one number per position, as with rotary embeddings.
        stride: Size of a patch.
    """

    def __init__(self, *, rope: bool = False, stride: int = 1) -> None:
        super().__init__()
        self.rope, self.stride = rope, stride
        with seeded(0):
            self.conv_in = nn.Conv2d(2, D, stride, stride=stride)
            self.blocks = nn.ModuleList([Block(D), Block(D)])
            self.conv_out = nn.Conv2d(D, 2, 1)
        self.requires_grad_(False)

    def forward(self, sample: Tensor, timestep: object = None, encoder_hidden_states: Tensor | None = None) -> Tensor:
        x = self.conv_in(sample)
        height, width = x.shape[2:]
        tokens = x.flatten(2).mT
        rope = torch.linspace(0.5, 2, height * width) if self.rope else None
        for block in self.blocks:
            tokens = block(tokens, encoder_hidden_states, rope)
        return self.conv_out(tokens.mT.unflatten(2, (height, width)))


def latent_and_text(batch: int = 2, height: int = 4, width: int = 6) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(batch, 2, height, width, generator=g), torch.randn(batch, 3, FEATURES, generator=g)


def left(height: int = 4, width: int = 6) -> Tensor:
    """1 in the left half."""
    map_ = torch.zeros(height, width)
    map_[:, : width // 2] = 1
    return map_
