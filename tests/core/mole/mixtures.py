"""Random LoRAs and gates for the models of models.py, and the merged weights that a mixture must equal."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence

import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from torch import Tensor, nn

from .models import FEATURES, call, inputs


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
    """Random factors for every layer, or for the layers in `names`."""
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
    """A copy of the model with the LoRAs merged into its weights, without attached mixtures."""
    model = copy.deepcopy(model)
    for module in model.modules():
        module.__dict__.pop("forward", None)
    with torch.no_grad():
        for adapter, g in zip(adapters, gates, strict=True):
            for name, part in adapter.modules.items():
                weight = model.get_submodule(name).weight
                weight += (g * part.delta()).reshape(weight.shape).to(weight.dtype)
    return model


def random_detector(experts: int, features: int, seed: int = 4, words: Sequence[Sequence[str]] = ()) -> ConceptDetector:
    """A detector with random weights, whose presences are neither near 0 nor near 1."""
    g = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(experts, features, generator=g), 0.3 * torch.randn(experts, generator=g)
    return ConceptDetector(0.7 * weight, bias, words or [[f"w{i}"] for i in range(experts)])


def random_gates(
    model: nn.Module, mixture: Mixture, settings: GateSettings, seed: int = 3, size: float = 0.5
) -> GateSet:
    """Gates with random weights that read what the mixture's gates read on this model, as if trained."""
    n, sizes = len(mixture.experts), {}
    detector = mixture.gates.detector
    if settings.reads == "text" and detector is None:
        detector = random_detector(n, FEATURES)

    def note_size(scope: str, f: Tensor, owner: Tensor | None) -> None:
        sizes[scope] = f.shape[1], owner

    untrained = Mixture(
        mixture.experts,
        GateSet(n, settings, detector=detector),
        mixture.strengths,
        mixture.scale,
        mixture.mixing,
        mixture.targets,
    )
    dtype = next(model.parameters()).dtype
    with torch.no_grad(), attach(model, untrained) as attachment, attachment.watch_inputs(note_size):
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
    return GateSet(n, settings, gates, detector)


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
    """The gate values of the last pass, by scope. A `GateObserver`."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def begin_pass(self, arguments: object) -> None:
        self.values = {}

    def gate_opened(self, scope: str, value: Tensor) -> None:
        self.values[scope] = value

    def regions_laid(self, maps: object) -> None:
        pass


def rms_normalised(x: Tensor, dim: int = -1) -> Tensor:
    """A layer's input as gates read it; 0 if it is 0."""
    return x / x.square().mean(dim, keepdim=True).sqrt().clamp_min(1e-6)


def gradients(attachment: Attachment, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
    """Gradients of a loss with respect to all parameters of the gates."""
    attachment.bank.gates.zero_grad()
    loss().backward()
    return {name: p.grad.clone() for name, p in attachment.bank.gates.named_parameters() if p.grad is not None}
