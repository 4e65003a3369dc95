"""Adapted layers: inputs without a batch dimension, and outputs that something else still refers to."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from legomole.core.mole import ownership
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from torch import Tensor, nn

from ..merge.pools import close
from .mixtures import lora, merged, trained
from .models import FEATURES, D

MODES = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}


class Modulation(nn.Module):
    """Blocks that apply linear layers to a single vector, as modulation layers of unbatched models do."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mod, self.out = nn.Linear(D, D), nn.Linear(D, D)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(torch.tanh(self.mod(x)))

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([self.Block(), self.Block()])
        self.requires_grad_(False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        x = x[:, 0].repeat(1, D // 4) if x.ndim == 3 else x  # the tokens (B, T, 4) of `inputs`
        for block in self.blocks:
            x = block(x)
        return x


class TestUnbatchedInputs:
    @pytest.mark.parametrize("mixing", ["delta", "output"])
    def test_a_vector_equals_merged_weights(self, mixing):
        model = Modulation()
        experts, x = (lora(model, 1), lora(model, 2)), torch.randn(D)
        mixture = Mixture(experts, GateSet(2, GateSettings(granularity="block")), (0.8, -0.5), mixing=mixing)
        with attach(model, mixture) as attachment, torch.no_grad():
            for i, strengths in enumerate(((0.8, 0.0), (0.0, -0.5))):
                with attachment.hold(torch.eye(2)[i]):
                    found = model(x)
                assert found.shape == x.shape
                assert close(found, merged(model, experts, strengths)(x))

    @pytest.mark.parametrize(
        ("reads", "mixing"),
        [(reads, "delta") for reads in ("text", "hidden", "experts", "flat", "token")]
        + [(reads, "output") for reads in ("hidden", "experts", "flat")],
    )
    def test_a_vector_equals_a_batch_of_one(self, reads, mixing):
        model = Modulation()
        settings = GateSettings(reads=reads, granularity="block")
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings, mixing)
        x, text = torch.randn(D), torch.randn(1, 3, FEATURES)
        with attach(model, mixture), torch.no_grad():
            found, expected = model(x, text), model(x[None], text)[0]
        assert found.shape == x.shape
        assert close(found, expected, 1e-6)

    @pytest.mark.parametrize("reads", ["hidden", "experts"])
    def test_an_image_equals_a_batch_of_one(self, reads):
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.Conv2d(4, 2, 1)).requires_grad_(False)
        model.forward = lambda x, context=None, layers=list(model): layers[1](layers[0](x))
        x = torch.randn(2, 6, 6)
        experts = lora(model, 1), lora(model, 2)
        gates = GateSet(2, GateSettings(reads=reads))
        features: list[Tensor] = []
        with (
            attach(model, Mixture(experts, gates, (0.7, 0.4))) as attachment,
            torch.no_grad(),
            attachment.watch_inputs(lambda scope, f, owner: features.append(f)),
        ):
            found, expected = model(x), model(x[None])[0]
        assert close(found, expected, 1e-6)
        assert close(features[0], features[1], 1e-6)


STORED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "itself": lambda stored, x: stored,
    "a view": lambda stored, x: stored.view(2, 3, 4),
    "a part": lambda stored, x: stored[:2],
    "detached": lambda stored, x: stored.detach(),
    "its data": lambda stored, x: stored.data,
    "expanded": lambda stored, x: stored[:1].expand(2, 3, 4),
    "its memory": lambda stored, x: torch.from_numpy(stored.numpy()),
}


class Stored(nn.Linear):
    """A linear layer that returns a stored tensor, like a cache for a constant input."""

    def __init__(self, returned: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__(4, 4)
        self.requires_grad_(False)
        self.returned, self.stored = returned, torch.randn(2, 3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.returned(self.stored, x)


class Remembering(nn.Linear):
    """A linear layer that keeps its last output."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = {"last": [super().forward(x)]}
        return self.kept["last"][0]


class TestOutputsInUseElsewhere:
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("returned", STORED)
    def test_a_stored_tensor_is_not_overwritten(self, returned, mode):
        model = nn.ModuleDict({"layer": Stored(STORED[returned])})
        layer, x = model["layer"], torch.randn(2, 3, 4)
        with MODES[mode]():
            layer.stored = layer.stored.clone()  # created in this mode: views of inference tensors have no base
            before = layer.stored.clone()
            plain = layer(x).clone()
            low = lora(model, 1)
            with attach(model, Mixture((low,))):
                first, second = layer(x), layer(x)
            assert torch.equal(layer.stored, before)
            assert close(first, plain + x @ low.modules["layer"].delta().mT)
            assert torch.equal(first, second)

    @pytest.mark.parametrize("mode", MODES)
    def test_an_array_of_numpy_is_not_overwritten(self, mode):
        array = np.ones((2, 3, 4), dtype=np.float32)
        model = nn.ModuleDict({"layer": Stored(lambda stored, x: torch.from_numpy(array))})
        with MODES[mode](), attach(model, Mixture((lora(model, 1),))):
            assert not torch.equal(model["layer"](torch.randn(2, 3, 4)), torch.ones(2, 3, 4))
        assert (array == 1).all()

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("shape", [(2, 4), (2, 3, 4), (4,)])
    def test_an_output_that_the_layer_keeps_is_not_overwritten(self, mode, shape):
        model = nn.ModuleDict({"layer": Remembering(4, 4).requires_grad_(False)})
        layer, x = model["layer"], torch.randn(shape)
        with MODES[mode](), attach(model, Mixture((lora(model, 1),))):
            mixed = layer(x)
            assert close(layer.kept["last"][0], nn.functional.linear(x, layer.weight, layer.bias), 1e-6)
            assert not close(mixed, layer.kept["last"][0], 0.01)

    @pytest.mark.parametrize("mode", MODES)
    def test_an_input_that_is_returned_is_not_overwritten(self, mode):
        for returned in (lambda stored, x: x, lambda stored, x: x.view(x.shape), lambda stored, x: x.detach()):
            model = nn.ModuleDict({"layer": Stored(returned)})
            with MODES[mode](), attach(model, Mixture((lora(model, 1),))):
                x = torch.ones(2, 3, 4)
                assert not torch.equal(model["layer"](x), x)
                assert torch.equal(x, torch.ones(2, 3, 4))


class Own(nn.Linear):
    """A layer with its own forward method, like the layers of hosts and quantisation libraries."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype)
        return nn.functional.linear(x, weight, self.bias)


class TestNewOutputs:
    """The sum is written into the output, without a copy."""

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(
        ("layer", "shape"),
        [
            (nn.Linear(4, 6), (5, 4)),
            (nn.Linear(4, 6), (2, 3, 4)),
            (nn.Linear(4, 6), (4,)),
            (nn.Linear(4, 6, bias=False), (2, 3, 4)),
            (nn.Linear(4, 6).bfloat16(), (2, 3, 4)),
            (Own(4, 6), (2, 3, 4)),
            (nn.Conv2d(3, 6, 3), (2, 3, 5, 5)),
            (nn.Conv2d(3, 6, 3), (3, 5, 5)),
            (nn.Conv2d(3, 6, 3).to(memory_format=torch.channels_last), (2, 3, 5, 5)),
        ],
    )
    def test_are_overwritten(self, layer, shape, mode):
        model = nn.ModuleDict({"layer": layer.requires_grad_(False)})
        addresses: list[int] = []
        inner = layer.forward

        def watched(x: Tensor) -> Tensor:
            y = inner(x)
            addresses.append(y.data_ptr())
            return y

        layer.forward = watched
        low = lora(model, 1)
        try:
            with MODES[mode](), attach(model, Mixture((low,))):
                found = model["layer"](torch.randn(shape, dtype=layer.weight.dtype))
        finally:
            del layer.forward
        assert addresses == [found.data_ptr()]

    def test_never_without_a_count_of_tensors_that_share_memory(self, monkeypatch):
        """Older builds of PyTorch lack this count."""
        monkeypatch.setattr(ownership, "_storage_use_count", None)
        with torch.no_grad():
            assert not ownership.is_only_reference([torch.zeros(2)])

    def test_not_inside_vmap(self):
        def double(x: Tensor) -> Tensor:
            assert not ownership.is_only_reference([x * 2])
            return x * 2

        assert torch.equal(torch.vmap(double)(torch.ones(2, 3)), torch.full((2, 3), 2.0))
