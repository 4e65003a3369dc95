"""Cross attention under regions, and whole models whose positions do not see each other."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from torch import Tensor, nn

from ..mixtures import lora, merged, trained
from ..models import UNet, inputs
from .models import ByPosition, latent_and_text, left

pytestmark = pytest.mark.usefixtures("no_gradients")

POSITIONED = ("conv_in", "blocks.0.attn2", "blocks.1.attn2", "blocks.0.ff", "blocks.1.ff", "conv_out")


def two_loras(model: nn.Module, *, only: tuple[str, ...] = POSITIONED) -> list:
    names = [name for name, _ in model.named_modules() if name.startswith(only)]
    return [lora(model, seed, names=names) for seed in (1, 2)]


def run(model: nn.Module, mixture: Mixture, x: Tensor, text: Tensor) -> Tensor:
    with attach(model, mixture):
        return model(x, encoder_hidden_states=text)


@pytest.mark.parametrize("rope", [False, True])
def test_halves_are_the_pictures_of_each_lora_alone(rope: bool) -> None:
    """All layers, keys and values too; with rotary numbers per position the attention runs for all positions."""
    model = ByPosition(rope=rope)
    x, text = latent_and_text()
    adapters = two_loras(model)
    mixed = run(model, Mixture(adapters, regions=[left(), 1 - left()]), x, text)
    alone = [merged(model, [adapter], [1.0])(x, encoder_hidden_states=text) for adapter in adapters]
    torch.testing.assert_close(mixed, torch.where(left() > 0, *alone), atol=2e-5, rtol=1e-4)
    assert (alone[0] - alone[1]).abs().mean() > 0.1


def test_outside_of_a_map_is_the_base_models_picture() -> None:
    model = ByPosition()
    x, text = latent_and_text()
    adapters = two_loras(model)
    mixed = run(model, Mixture(adapters, regions=[left(), torch.zeros(4, 6)]), x, text)
    half = merged(model, adapters[:1], [1.0])(x, encoder_hidden_states=text)
    expected = torch.where(left() > 0, half, model(x, encoder_hidden_states=text))
    torch.testing.assert_close(mixed, expected, atol=2e-5, rtol=1e-4)


def test_a_lora_without_a_map_acts_everywhere() -> None:
    model = ByPosition()
    x, text = latent_and_text()
    adapters = two_loras(model)
    mixed = run(model, Mixture(adapters, regions=[left(), None]), x, text)
    both, second = (
        merged(model, adapters[first:], [1.0] * (2 - first))(x, encoder_hidden_states=text) for first in (0, 1)
    )
    torch.testing.assert_close(mixed, torch.where(left() > 0, both, second), atol=2e-5, rtol=1e-4)


def test_soft_and_overlapping_maps_weigh_the_attentions_outputs() -> None:
    """``A_0 + sum_m c_m (A_m - A_0)`` where only keys and values are changed."""
    model = ByPosition()
    x, text = latent_and_text()
    adapters = two_loras(model, only=("blocks.1.attn2.to_k", "blocks.1.attn2.to_v"))
    maps = [torch.linspace(0, 1, 24).view(4, 6), torch.full((4, 6), 0.7)]
    seen: list[Tensor] = []
    hook = model.blocks[1].attn2.register_forward_hook(lambda _, args, y: seen.append(y))
    run(model, Mixture(adapters, regions=maps), x, text)
    hook.remove()
    outputs = []
    for kept in ([], [0], [1]):
        twin = merged(model, [adapters[i] for i in kept], [1.0] * len(kept))
        hook = twin.blocks[1].attn2.register_forward_hook(lambda _, args, y: outputs.append(y))
        twin(x, encoder_hidden_states=text)
        hook.remove()
    shares = [m.flatten()[None, :, None] for m in maps]
    expected = outputs[0] + sum(c * (y - outputs[0]) for c, y in zip(shares, outputs[1:], strict=True))
    torch.testing.assert_close(seen[0], expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("size", [(1, 1), (4, 6), (40, 36)])
def test_ones_are_no_map_bit_for_bit(size: tuple[int, int]) -> None:
    model = ByPosition()
    x, text = latent_and_text()
    adapters = two_loras(model)
    plain = run(model, Mixture(adapters), x, text)
    assert torch.equal(run(model, Mixture(adapters, regions=[torch.ones(size), None]), x, text), plain)


@pytest.mark.parametrize("build", [ByPosition, UNet])
def test_zeros_are_the_lora_switched_off(build: type[nn.Module]) -> None:
    model = build()
    x, text = latent_and_text() if build is ByPosition else inputs(model)
    adapters = [lora(model, seed) for seed in (1, 2)]
    off = run(model, Mixture(adapters).without(0), x, text)
    torch.testing.assert_close(run(model, Mixture(adapters, regions=[torch.zeros(3, 3), None]), x, text), off)


@pytest.mark.parametrize("reads", ["text", "text-mean", "hidden"])
def test_maps_multiply_trained_gates(reads: str) -> None:
    """A map of 0.5 is half the strength, at convolutions and sequences, as long as gates read the same."""
    model = UNet()
    x, text = inputs(model)
    adapters = [lora(model, seed, names=["conv_out"]) for seed in (1, 2)]
    mixture = trained(model, adapters, GateSettings(reads=reads, granularity="matrix"))
    halves = [torch.full((1, 1), 0.5), torch.full((1, 1), 0.5)]
    regional = run(model, Mixture(mixture.experts, mixture.gates, regions=halves), x, text)
    half = run(model, Mixture(mixture.experts, mixture.gates, strengths=(0.5, 0.5)), x, text)
    torch.testing.assert_close(regional, half)
    assert not torch.equal(regional, run(model, mixture, x, text))


def test_softmax_gates_and_maps() -> None:
    model = ByPosition()
    x, text = latent_and_text()
    adapters = two_loras(model)
    gates = GateSet(2, GateSettings(activation="softmax", reads="text-mean", granularity="network"))
    mixed = run(model, Mixture(adapters, gates, regions=[left(), 1 - left()]), x, text)
    alone = [merged(model, [adapter], [0.5])(x, encoder_hidden_states=text) for adapter in adapters]
    torch.testing.assert_close(mixed, torch.where(left() > 0, *alone), atol=2e-5, rtol=1e-4)


def test_an_attention_that_returns_something_else_is_an_error() -> None:
    model = ByPosition()
    x, text = latent_and_text()
    attention = model.blocks[0].attn2
    inner = attention.forward
    attention.forward = lambda *args, **kwargs: (inner(*args, **kwargs), None)
    with (
        attach(model, Mixture(two_loras(model), regions=[left(), None])),
        pytest.raises(MergeError, match=r"no sequence of the picture.\n  module:   blocks.0.attn2"),
    ):
        model(x, encoder_hidden_states=text)
