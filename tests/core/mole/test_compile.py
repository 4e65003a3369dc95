"""Mixtures and ``torch.compile`` in either order. Traced graphs are run without a compiler, so no C++ is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.mixture import Mixture
from torch import Tensor, nn

from ..merge.pools import close
from .mixtures import gradients, lora, trained, untouched
from .models import InPlace, Transformer, call, inputs
from .regions.models import ByPosition, latent_and_text, left
from .regions.test_automatic import experts, text_that_names_both
from .regions.test_factors import Reader

pytestmark = pytest.mark.filterwarnings("ignore:Guards may run slower:RuntimeWarning")  # PyTorch's, on Python 3.13.0


class Backend:
    """Runs graphs without compiling them, and counts them."""

    def __init__(self) -> None:
        self.compiled = 0

    def __call__(self, graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., object]:
        self.compiled += 1
        return graph.forward


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    with torch.no_grad():
        yield
    torch._dynamo.reset()


def mixed(model: nn.Module, reads: str, mixing: str, granularity: str) -> Mixture:
    settings = GateSettings(reads=reads, granularity=granularity)
    few = [name for name in lora(model, 0).modules if name.endswith(("inp", "to_q", "ff.0", "img.qkv"))]
    return trained(model, (lora(model, 1, names=few), lora(model, 2, names=few)), settings, mixing)


@pytest.mark.parametrize(
    ("reads", "mixing", "granularity"), [("text", "delta", "layer"), ("experts", "output", "block")]
)
def test_compiled_first(reads, mixing, granularity):
    model, backend = Transformer(1), Backend()
    x, text = inputs(model)
    base, mixture = model(x, text), mixed(model, reads, mixing, granularity)
    with attach(model, mixture):
        expected = model(x, text)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    assert torch.equal(compiled(x, text), base)
    with attach(compiled, mixture):
        assert close(compiled(x, text), expected, 1e-6)
        traced = backend.compiled
        assert close(compiled(x, text), expected, 1e-6)
        assert backend.compiled == traced == 2  # once without and once with the mixture, not once per step
    assert untouched(model)
    assert torch.equal(compiled(x, text), base)


def test_attached_first():
    model, backend = Transformer(1), Backend()
    x, text = inputs(model)
    base = model(x, text)
    with attach(model, mixed(model, "hidden", "delta", "layer")):
        expected = model(x, text)
        compiled = torch.compile(model, backend=backend, fullgraph=True)
        assert close(compiled(x, text), expected, 1e-6)
    assert torch.equal(compiled(x, text), base)
    assert backend.compiled == 2


def test_other_values_of_the_gates_reach_a_compiled_model():
    model = Transformer(1)
    x, text = inputs(model)
    mixture = mixed(model, "text", "delta", "layer")
    compiled = torch.compile(model, backend=Backend(), fullgraph=True)
    with attach(model, mixture) as at:
        for gates in ([1.0, 0.0], [0.0, 1.0], [0.3, 0.4]):
            with at.hold(gates):
                assert close(compiled(x, text), model(x, text), 1e-6)
        assert close(compiled(x, text), model(x, text), 1e-6)
        with torch.no_grad():
            for p in at.bank.gates.parameters():
                p.mul_(-1)
        assert close(compiled(x, text), model(x, text), 1e-6)


def test_blocks_compiled_one_by_one():
    """Like diffusers' `compile_repeated_blocks`."""
    model, backend = InPlace(1), Backend()
    x, text = inputs(model)
    base, mixture = call(model, x, text), mixed(model, "hidden", "delta", "block")
    with attach(model, mixture):
        expected = call(model, x, text)
    for block in model.double_blocks:
        block.compile(backend=backend)
    assert close(call(model, x, text), base, 1e-6)
    with attach(model, mixture):
        assert close(call(model, x, text), expected, 1e-6)
        traced = backend.compiled
        assert close(call(model, x, text), expected, 1e-6)
        assert backend.compiled == traced
    assert close(call(model, x, text), base, 1e-6)


def in_three_steps(model: nn.Module, mixture: Mixture, call: Callable[..., Tensor], text: Tensor) -> Tensor:
    """The outputs of three sampling steps."""
    reader, outputs = Reader(), []
    with attach(model, mixture, sampling=reader):
        for at in (0.0, 0.2, 0.6):
            reader.at = at
            outputs.append(call(latent_and_text()[0], encoder_hidden_states=text))
    return torch.stack(outputs)


@pytest.mark.parametrize("blocks", [False, True])
def test_regions_and_steps(blocks: bool):
    """Cross attention runs for all positions, because a graph cannot depend on the maps."""
    names = ["conv_in", "conv_out", "blocks.0.ff", "blocks.0.attn2.to_k", "blocks.1.attn2.to_v"]
    _, text = latent_and_text()
    model, backend = ByPosition(), Backend()
    adapters = [lora(model, seed, names=names) for seed in (1, 2)]
    mixture = Mixture(adapters, regions=[left(), 1 - left()], steps=[(0, 1), (0, 0.5)])
    expected = in_three_steps(model, mixture, model, text)
    if blocks:
        for block in model.blocks:
            block.compile(backend=backend, fullgraph=True)
    compiled = model if blocks else torch.compile(model, backend=backend, fullgraph=True)
    assert close(in_three_steps(model, mixture, compiled, text), expected, 1e-6)
    assert backend.compiled > 0


def test_automatic_regions_of_a_model_whose_blocks_are_compiled():
    model, text = ByPosition(), text_that_names_both()
    mixture = experts(model)
    expected = in_three_steps(model, mixture, model, text)
    assert not close(expected[1], expected[0], 1e-3)
    for block in model.blocks:
        block.compile(backend=Backend(), fullgraph=True)
    assert close(in_three_steps(model, mixture, model, text), expected, 1e-6)


@pytest.mark.slow
def test_gradients_of_a_compiled_model():
    model = Transformer(1)
    x, text = inputs(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with attach(model, mixed(model, "experts", "delta", "block")) as at, torch.enable_grad():
        expected = gradients(at, lambda: model(x, text).square().mean())
        found = gradients(at, lambda: compiled(x, text).square().mean())
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-4, atol=1e-6), name


def test_a_stored_output_is_not_overwritten():
    class Stored(nn.Linear):
        """A linear layer that returns a stored tensor."""

        def forward(self, x: Tensor) -> Tensor:
            return self.stored

    model = nn.Sequential(Stored(4, 4)).requires_grad_(False)
    model[0].stored = torch.ones(3, 4)
    compiled = torch.compile(model, backend=Backend(), fullgraph=True)
    with attach(model, Mixture((lora(model, 1),))):
        first, second = compiled(torch.ones(3, 4)).clone(), compiled(torch.ones(3, 4))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.ones(3, 4))
    assert torch.equal(model[0].stored, torch.ones(3, 4))
