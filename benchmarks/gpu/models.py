"""Random models with the layers of SDXL's U-Net, Flux and a Llama of 8 billion weights, in plain torch.

Only shapes matter: normalisation has no parameters, and time, positions and modulation are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from torch import Tensor, nn
from torch.nn.functional import gelu, group_norm, interpolate, layer_norm, scaled_dot_product_attention, silu

Kind = Literal["sdxl", "flux", "llama"]


@dataclass(frozen=True)
class Size:
    """Sizes of the three models.

    Args:
        widths: Widths of the U-Net's levels. depths: Transformer blocks of each level's transformers.
        repeats: Residual blocks of a level going down; there is one more going up.
        text: Width of the text conditioning of U-Net and Flux. side: Side of the latents.
        flux: Width of Flux. double, single: Number of its blocks.
        llama: Width of the Llama. layers: Number of its layers. keys: Width of its keys. hidden: Of its feed-forward.
        tokens: Number of tokens of a text.
    """

    widths: tuple[int, ...]
    depths: tuple[int, ...]
    repeats: int
    text: int
    side: int
    flux: int
    double: int
    single: int
    llama: int
    layers: int
    keys: int
    hidden: int
    tokens: int


SIZES = {
    # the whole U-Net at 1,024 pixels; a quarter of Flux's and Llama's layers, which are all alike
    "full": Size((320, 640, 1280), (0, 2, 10), 2, 2048, 128, 3072, 5, 10, 4096, 8, 1024, 14336, 512),
    "small": Size((8, 16), (0, 1), 1, 16, 8, 32, 1, 1, 32, 1, 16, 48, 6),
}


class Attention(nn.Module):
    """Attention with four projections, as diffusers names them."""

    def __init__(self, width: int, source: int, head: int, keys: int | None = None, **where: Any) -> None:
        super().__init__()
        self.head = head
        self.to_q = nn.Linear(width, width, bias=False, **where)
        self.to_k = nn.Linear(source, keys or width, bias=False, **where)
        self.to_v = nn.Linear(source, keys or width, bias=False, **where)
        self.to_out = nn.Linear(width, width, **where)

    def forward(self, x: Tensor, source: Tensor | None = None, causal: bool = False) -> Tensor:
        source = x if source is None else source
        q, k, v = self.to_q(x), self.to_k(source), self.to_v(source)
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in (q, k, v))
        if k.shape[1] < q.shape[1]:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        return self.to_out(scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2))


def _normalised(x: Tensor) -> Tensor:
    return layer_norm(x, x.shape[-1:])


class CrossBlock(nn.Module):
    """A transformer block of a U-Net."""

    def __init__(self, width: int, text: int, **where: Any) -> None:
        super().__init__()
        head = min(64, width // 2)
        self.attn1 = Attention(width, width, head, **where)
        self.attn2 = Attention(width, text, head, **where)
        self.up, self.down = nn.Linear(width, 8 * width, **where), nn.Linear(4 * width, width, **where)

    def forward(self, hidden_states: Tensor, text: Tensor) -> Tensor:
        x = hidden_states + self.attn1(_normalised(hidden_states))
        x = x + self.attn2(_normalised(x), text)
        value, gate = self.up(_normalised(x)).chunk(2, -1)
        return x + self.down(value * gelu(gate))


class ResBlock(nn.Module):
    """Two convolutions, and transformer blocks on their output."""

    def __init__(self, channels: int, width: int, depth: int, text: int, **where: Any) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1, **where)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, **where)
        self.shortcut = nn.Conv2d(channels, width, 1, **where) if channels != width else None
        self.proj_in, self.proj_out = (nn.Linear(width, width, **where) if depth else None for _ in range(2))
        self.blocks = nn.ModuleList(CrossBlock(width, text, **where) for _ in range(depth))

    def forward(self, x: Tensor, text: Tensor) -> Tensor:
        y = self.conv1(silu(group_norm(x, 8)))
        y = self.conv2(silu(group_norm(y, 8)))
        x = (x if self.shortcut is None else self.shortcut(x)) + y
        if self.proj_in is None or self.proj_out is None:
            return x
        h = self.proj_in(group_norm(x, 8).flatten(2).mT)
        for block in self.blocks:
            h = block(h, text)
        return x + self.proj_out(h).mT.view_as(x)


class UNet(nn.Module):
    """A U-Net with skip connections."""

    def __init__(self, size: Size, **where: Any) -> None:
        super().__init__()
        self.repeats = size.repeats
        self.inp = nn.Conv2d(4, size.widths[0], 3, padding=1, **where)
        channels, skips = size.widths[0], [size.widths[0]]
        self.down_blocks, self.shrink = nn.ModuleList(), nn.ModuleList()
        for level, (width, depth) in enumerate(zip(size.widths, size.depths, strict=True)):
            for _ in range(size.repeats):
                self.down_blocks.append(ResBlock(channels, width, depth, size.text, **where))
                channels = width
                skips.append(channels)
            if level < len(size.widths) - 1:
                self.shrink.append(nn.Conv2d(width, width, 3, stride=2, padding=1, **where))
                skips.append(channels)
        self.mid = nn.ModuleList([ResBlock(channels, channels, size.depths[-1], size.text, **where)])
        self.up_blocks, self.grow = nn.ModuleList(), nn.ModuleList()
        for level in reversed(range(len(size.widths))):
            for _ in range(size.repeats + 1):
                width, depth = size.widths[level], size.depths[level]
                self.up_blocks.append(ResBlock(channels + skips.pop(), width, depth, size.text, **where))
                channels = width
            if level:
                self.grow.append(nn.Conv2d(channels, channels, 3, padding=1, **where))
        self.out = nn.Conv2d(channels, 4, 3, padding=1, **where)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        text = encoder_hidden_states
        x = self.inp(x)
        skips = [x]
        for n, block in enumerate(self.down_blocks):
            x = block(x, text)
            skips.append(x)
            level, last = divmod(n + 1, self.repeats)
            if not last and level <= len(self.shrink):
                x = self.shrink[level - 1](x)
                skips.append(x)
        x = self.mid[0](x, text)
        for n, block in enumerate(self.up_blocks):
            x = block(torch.cat([x, skips.pop()], 1), text)
            level, last = divmod(n + 1, self.repeats + 1)
            if not last and level <= len(self.grow):
                x = self.grow[level - 1](interpolate(x, scale_factor=2.0))
        return self.out(silu(group_norm(x, 8)))


class DoubleBlock(nn.Module):
    """A Flux block with separate weights for image and text."""

    def __init__(self, width: int, **where: Any) -> None:
        super().__init__()
        self.head = min(128, width // 2)
        for stream in ("img", "txt"):
            self.add_module(f"{stream}_qkv", nn.Linear(width, 3 * width, **where))
            self.add_module(f"{stream}_proj", nn.Linear(width, width, **where))
            layers = nn.Linear(width, 4 * width, **where), nn.GELU("tanh"), nn.Linear(4 * width, width, **where)
            self.add_module(f"{stream}_mlp", nn.Sequential(*layers))

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        qkv = torch.cat([self.txt_qkv(_normalised(txt)), self.img_qkv(_normalised(img))], 1)
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        txt, img = txt + self.txt_proj(y[:, : txt.shape[1]]), img + self.img_proj(y[:, txt.shape[1] :])
        return img + self.img_mlp(_normalised(img)), txt + self.txt_mlp(_normalised(txt))


class SingleBlock(nn.Module):
    """A Flux block with one product before the attention and one after it."""

    def __init__(self, width: int, **where: Any) -> None:
        super().__init__()
        self.width, self.head = width, min(128, width // 2)
        self.linear1, self.linear2 = nn.Linear(width, 7 * width, **where), nn.Linear(5 * width, width, **where)

    def forward(self, x: Tensor) -> Tensor:
        qkv, hidden = self.linear1(_normalised(x)).split([3 * self.width, 4 * self.width], -1)
        q, k, v = (t.unflatten(-1, (-1, self.head)).transpose(1, 2) for t in qkv.chunk(3, -1))
        y = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.linear2(torch.cat([y, gelu(hidden, approximate="tanh")], -1))


class Flux(nn.Module):
    """Double and single blocks on patches of latents and on text."""

    def __init__(self, size: Size, **where: Any) -> None:
        super().__init__()
        self.img_in, self.txt_in = nn.Linear(64, size.flux, **where), nn.Linear(size.text, size.flux, **where)
        self.double_blocks = nn.ModuleList(DoubleBlock(size.flux, **where) for _ in range(size.double))
        self.single_blocks = nn.ModuleList(SingleBlock(size.flux, **where) for _ in range(size.single))
        self.final = nn.Linear(size.flux, 64, **where)

    def forward(self, x: Tensor, encoder_hidden_states: Tensor) -> Tensor:
        img, txt = self.img_in(x), self.txt_in(encoder_hidden_states)
        for block in self.double_blocks:
            img, txt = block(img, txt)
        joint = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            joint = block(joint)
        return self.final(joint[:, txt.shape[1] :])


class LlamaLayer(nn.Module):
    """Causal attention with fewer keys than queries, and a gated feed-forward."""

    def __init__(self, size: Size, **where: Any) -> None:
        super().__init__()
        self.self_attn = Attention(size.llama, size.llama, min(128, size.keys), size.keys, **where)
        self.gate_proj, self.up_proj = (nn.Linear(size.llama, size.hidden, bias=False, **where) for _ in range(2))
        self.down_proj = nn.Linear(size.hidden, size.llama, bias=False, **where)

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states + self.self_attn(_normalised(hidden_states), causal=hidden_states.shape[1] > 1)
        y = _normalised(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """Layers on embedded tokens."""

    def __init__(self, size: Size, **where: Any) -> None:
        super().__init__()
        self.layers = nn.ModuleList(LlamaLayer(size, **where) for _ in range(size.layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


_CLASSES: dict[Kind, type[nn.Module]] = {"sdxl": UNet, "flux": Flux, "llama": Llama}


def build(kind: Kind, size: Size, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """Build a model whose weights need no gradients."""
    return _CLASSES[kind](size, device=device, dtype=dtype).requires_grad_(False).eval()


def inputs(kind: Kind, size: Size, device: torch.device, dtype: torch.dtype) -> Mapping[str, Tensor]:
    """Random arguments of a model: a prompt and its negative prompt for the U-Net, one sample for the others."""
    made: dict[str, Tensor] = {}
    if kind == "sdxl":
        made["x"] = torch.randn(2, 4, size.side, size.side)
        made["encoder_hidden_states"] = torch.randn(2, 77, size.text)
    elif kind == "flux":
        made["x"] = torch.randn(1, (size.side // 2) ** 2, 64)
        made["encoder_hidden_states"] = torch.randn(1, size.tokens, size.text)
    else:
        made["x"] = torch.randn(1, size.tokens, size.llama)
    return {name: x.to(device, dtype) for name, x in made.items()}


def adapted_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers inside numbered blocks by name: those that LoRAs usually change."""
    return {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and any(part.isdigit() for part in name.split("."))
    }


def loras(model: nn.Module, n: int, rank: int, seed: int = 0) -> list[Adapter]:
    """Return `n` random LoRAs in the model's dtype, on the CPU, whose sum has half the norm of the weights."""
    generator = torch.Generator().manual_seed(seed)
    adapters: list[Adapter] = []
    for _ in range(n):
        modules: dict[str, LowRank] = {}
        for name, layer in adapted_layers(model).items():
            W = layer.weight
            assert isinstance(W, Tensor)
            d_out, d_in = W.shape[0], math.prod(W.shape[1:])
            norm = float(W.float().norm())
            A = torch.randn(rank, d_in, generator=generator) / d_in**0.5
            B = torch.randn(d_out, rank, generator=generator) * 0.5 * norm / (n * rank * d_out) ** 0.5
            modules[name] = LowRank(A.to(W.dtype), B.to(W.dtype), kernel=tuple(W.shape[2:]))
        adapters.append(Adapter(modules))
    return adapters


@dataclass
class RandomDenoiser:
    """A `core.train.denoiser.Denoiser` by flow matching on a model, with random text conditionings.

    Args:
        model: U-Net or Flux. text: ``(prompts, tokens, F)``, on the model's device and in its dtype.
        shape: Shape of the latents of one sample.
    """

    model: nn.Module
    text: Tensor
    shape: tuple[int, ...]

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        x = self.noise(len(prompts), seed)
        return x - self.predict(x, torch.ones(len(prompts)), prompts)

    def noise(self, batch: int, seed: int) -> Tensor:
        noise = torch.randn(batch, *self.shape, generator=torch.Generator().manual_seed(seed))
        return noise.to(self.text.device)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        t = self._times(t, noise)
        return (1 - t) * latents.to(noise.device) + t * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - latents.to(noise.device)

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return self.model(noisy.to(self.text), encoder_hidden_states=self.text[list(prompts)]).float()

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy.to(prediction.device) - self._times(t, prediction) * prediction

    def _times(self, t: Tensor, like: Tensor) -> Tensor:
        return t.to(like.device).view(-1, *(1 for _ in self.shape))
