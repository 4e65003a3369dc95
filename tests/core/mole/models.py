"""Small models to mix LoRAs on, random LoRAs and gates for them, and what a mixture means as merged weights."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Sequence

import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import Prompt
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
    """A model in the manner of Flux: in-place double blocks called with keywords, then the picture's stream alone."""

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
            img += 0.1  # as a control net does
        return self.final(torch.cat([txt, img], 1)[:, txt.shape[1] :])


class seeded:
    """Draws inside the block depend on the seed alone, and leave no trace outside."""

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
    """A picture (or tokens) and a text that a model of this file takes."""
    g = torch.Generator().manual_seed(seed)
    shape = (2, 6, 6) if isinstance(model, UNet) else (5, 4)
    x, text = torch.randn(batch, *shape, generator=g), torch.randn(batch, 3, FEATURES, generator=g)
    return x.to(dtype), text.to(dtype)


def call(model: nn.Module, x: Tensor, text: Tensor) -> Tensor:
    """The model's output, its text given by the name it has there."""
    return model(x, **{"encoder_hidden_states" if isinstance(model, UNet) else "context": text})


def lora(
    model: nn.Module,
    seed: int,
    rank: int = 2,
    *,
    names: Iterable[str] | None = None,
    size: float = 0.3,
    alpha: float | None = 1.0,
    dtype: torch.dtype = torch.float32,
    source: Source | None = None,
) -> Adapter:
    """Random factors for every layer, or those named."""
    g = torch.Generator().manual_seed(seed)
    chosen = set(names) if names is not None else None
    modules: dict[str, LowRank] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)) and (chosen is None or name in chosen):
            d_out, *rest = layer.weight.shape
            A = torch.randn(rank, int(torch.tensor(rest).prod()), generator=g).to(dtype)
            B = (size * torch.randn(d_out, rank, generator=g)).to(dtype)
            modules[name] = LowRank(A, B, alpha, tuple(rest[1:]))
    return Adapter(modules, source=source or Source())


def merged(model: nn.Module, adapters: Sequence[Adapter], gates: Sequence[float]) -> nn.Module:
    """A copy with the LoRAs in its weights, and without what is attached."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    with torch.no_grad():
        for adapter, g in zip(adapters, gates, strict=True):
            for name, part in adapter.modules.items():
                weight = model.get_submodule(name).weight
                weight += (g * part.delta()).reshape(weight.shape).to(weight.dtype)
    return model


def random_gates(
    model: nn.Module, mixture: Mixture, settings: GateSettings, seed: int = 3, size: float = 0.5
) -> GateSet:
    """Gates that read what the mixture's would on this model, with random weights: as if trained."""
    n, sizes = len(mixture.experts), {}

    def seen(scope: str, f: Tensor, owner: Tensor | None) -> None:
        sizes[scope] = f.shape[1], owner

    untrained = Mixture(
        mixture.experts, GateSet(n, settings), mixture.strengths, mixture.scale, mixture.mixing, mixture.targets
    )
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), attach(model, untrained) as attachment, attachment.watch_inputs(seen):
        call(model, *inputs(model, dtype=dtype))
        layers = attachment.layers_read
    g = torch.Generator().manual_seed(seed)
    gates: dict[str, Gate] = {}
    for scope, (features, owner) in sizes.items():
        spread, mean = 0.5 + torch.rand(features, generator=g), 0.1 * torch.randn(features, generator=g)
        gates[scope] = gate = Gate(features, n, settings, mean=mean, spread=spread, owner=owner, layer=layers[scope])
        with torch.no_grad():
            gate.weight.copy_(size * torch.randn(gate.weight.shape, generator=g))
            gate.bias.add_(size * torch.randn(gate.bias.shape, generator=g))
            gate.log_temperature.fill_(0.2)
    return GateSet(n, settings, gates)


def trained(
    model: nn.Module, adapters: Sequence[Adapter], settings: GateSettings, mixing: str = "delta", **kw
) -> Mixture:
    """A mixture with random gates."""
    even = Mixture(tuple(adapters), GateSet(len(adapters), settings), mixing=mixing, **kw)
    gates = random_gates(model, even, settings)
    return Mixture(even.experts, gates, even.strengths, even.scale, even.mixing, even.targets)


def untouched(model: nn.Module) -> bool:
    """Whether no module of the model has a forward method of its own."""
    return not any({"forward", "_old_forward"} & set(module.__dict__) for module in model.modules())


class Values:
    """Notes what the gates open to. A `GateObserver`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def begin_pass(self, arguments: object) -> None:
        self.values = {}

    def gate_opened(self, scope: str, value: Tensor) -> None:
        self.values[scope] = value


def rms_normalised(x: Tensor, dim: int = -1) -> Tensor:
    """What gates see of a layer's input; nothing where it is zero."""
    return x / x.square().mean(dim, keepdim=True).sqrt().clamp_min(1e-6)


def encode(text: str, length: int = 4) -> Tensor:
    """``(length, FEATURES)``: a fixed random vector per word."""
    words = (text.lower().replace(",", " ").split() or ["<empty>"])[:length]
    rows = torch.zeros(length, FEATURES)
    for row, word in zip(rows, words, strict=False):
        seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
        row += torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed))
    return rows


class ToyDenoiser:
    """Flow matching on a `Transformer` or an `InPlace`."""

    def __init__(self, model: nn.Module, prompts: Sequence[Prompt]) -> None:
        self.model = model
        self.text = torch.stack([encode(prompt.text) for prompt in prompts])

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        x = torch.randn(len(prompts), 5, 4, generator=torch.Generator().manual_seed(seed))
        return x - 0.5 * self.predict(x, torch.ones(len(prompts)), prompts)

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (1 - t.view(-1, 1, 1)) * latents + t.view(-1, 1, 1) * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return call(self.model, noisy, self.text[list(prompts)])

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t.view(-1, 1, 1) * prediction


def gradients(attachment: Attachment, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss with respect to every parameter of the gates."""
    attachment.bank.gates.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in attachment.bank.gates.named_parameters() if p.grad is not None}
