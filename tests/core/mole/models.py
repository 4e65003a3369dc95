"""Small models to mix LoRAs on."""

from __future__ import annotations

import torch
from torch import Tensor, nn

D, FEATURES = 8, 6  # width of the models, and of their text conditioning


class Attention(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = (nn.Linear(d, d) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(d, d), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        y = nn.functional.scaled_dot_product_attention(self.to_q(x), self.to_k(x), self.to_v(x))
        return self.to_out[1](self.to_out[0](y))


class Block(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.attn = Attention(d)
        self.ff = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.attn(hidden_states)
        return x + self.ff(x)


class Transformer(nn.Module):
    """Tokens ``(B, T, 4)`` with a text ``(B, L, FEATURES)``."""

    def __init__(self, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.inp, self.ctx, self.final = nn.Linear(4, D), nn.Linear(FEATURES, D), nn.Linear(D, 4)
            self.blocks = nn.ModuleList(Block(D) for _ in range(blocks))
        self.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        h = self.inp(x)
        if context is not None:
            h = h + self.ctx(context.mean(1))[:, None]
        for block in self.blocks:
            h = block(h)
        return self.final(h)


class ResBlock(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(d, d, 3, padding=1), nn.Conv2d(d, d, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(torch.tanh(self.conv1(x)))


class Spatial(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.proj_in, self.proj_out = nn.Conv2d(d, d, 1), nn.Conv2d(d, d, 1)
        self.transformer_blocks = nn.ModuleList([Block(d)])

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = self.proj_in(hidden_states)
        x = self.transformer_blocks[0](x.flatten(2).mT).mT.unflatten(2, x.shape[2:])
        return hidden_states + self.proj_out(x)


class Down(nn.Module):
    def __init__(self, d: int) -> None:
        super().__init__()
        self.resnets, self.attentions = nn.ModuleList([ResBlock(d)]), nn.ModuleList([Spatial(d)])
        self.downsamplers = nn.ModuleList([nn.Sequential(nn.Conv2d(d, d, 3, stride=2, padding=1))])

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        x = self.attentions[0](self.resnets[0](hidden_states))
        return self.downsamplers[0](x), (x,)


class UNet(nn.Module):
    """Images ``(B, 2, 6, 6)``, channels first; blocks within blocks, skip connections in a tuple, circular padding."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.conv_in = nn.Conv2d(2, D, 3, padding=1, padding_mode="circular")
            self.down_blocks = nn.ModuleList([Down(D)])
            self.ctx, self.conv_out = nn.Linear(FEATURES, D), nn.Conv2d(D, 2, 1)
        self.requires_grad_(False)

    def forward(self, sample: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        x = self.conv_in(sample) + self.ctx(encoder_hidden_states.mean(1))[..., None, None]
        x, (skip,) = self.down_blocks[0](x)
        return self.conv_out(nn.functional.interpolate(x, scale_factor=2.0) + skip)


class Stream(nn.Module):
    """One stream of a `DoubleBlock`: its own modulation, attention and feed-forward."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.mod, self.qkv, self.proj = nn.Linear(d, 2 * d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, d), nn.GELU(), nn.Linear(d, d))


class DoubleBlock(nn.Module):
    """Two streams in keyword arguments, which it writes into."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.img, self.txt = Stream(d), Stream(d)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        n = txt.shape[1]
        q, k, v = torch.cat([self.txt.qkv(txt), self.img.qkv(img)], 1).chunk(3, -1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        for x, own, stream in ((img, y[:, n:], self.img), (txt, y[:, :n], self.txt)):
            one, two = stream.mod(vec)[:, None].chunk(2, -1)
            x += one * stream.proj(own)
            x += two * stream.mlp(x * one)
        return img, txt


class InPlace(nn.Module):
    """A model like Flux: double blocks called with keywords that work in place, then the image stream alone."""

    def __init__(self, blocks: int = 2, seed: int = 0) -> None:
        super().__init__()
        with seeded(seed):
            self.img_in, self.txt_in, self.vec_in = nn.Linear(4, D), nn.Linear(FEATURES, D), nn.Linear(FEATURES, D)
            self.double_blocks, self.final = nn.ModuleList(DoubleBlock(D) for _ in range(blocks)), nn.Linear(D, 4)
        self.requires_grad_(False)

    def forward(self, x: Tensor, timestep: object = None, *, context: Tensor) -> Tensor:
        img, txt, vec = self.img_in(x), self.txt_in(context), self.vec_in(context.mean(1))
        for block in self.double_blocks:
            img, txt = block(img=img, txt=txt, vec=vec)
            img += 0.1  # as a ControlNet does
        return self.final(torch.cat([txt, img], 1)[:, txt.shape[1] :])


class seeded:
    """Random numbers inside the block depend on the seed only, and do not change those outside."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __enter__(self) -> None:
        self.before = torch.get_rng_state()
        torch.manual_seed(self.seed)

    def __exit__(self, *_: object) -> None:
        torch.set_rng_state(self.before)


def inputs(
    model: nn.Module, batch: int = 2, seed: int = 1, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """An image (or tokens) and a text as input for a model of this file."""
    g = torch.Generator().manual_seed(seed)
    shape = (2, 6, 6) if isinstance(model, UNet) else (5, 4)
    x, text = torch.randn(batch, *shape, generator=g), torch.randn(batch, 3, FEATURES, generator=g)
    return x.to(dtype), text.to(dtype)


def call(model: nn.Module, x: Tensor, text: Tensor) -> Tensor:
    """The model's output; the text is passed by the model's own argument name."""
    return model(x, **{"encoder_hidden_states" if isinstance(model, UNet) else "context": text})
