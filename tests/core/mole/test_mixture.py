"""Mixture: checks of its arguments, and experts that are switched off."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture

from .mixtures import lora
from .models import Transformer


@pytest.fixture(scope="module")
def experts():
    model = Transformer()
    return tuple(lora(model, seed) for seed in range(3))


def test_defaults(experts):
    mixture = Mixture(list(experts))
    assert mixture.experts == experts
    assert mixture.strengths == (1.0, 1.0, 1.0)
    assert mixture.gates.experts == 3
    assert not mixture.gates.trained
    assert mixture.labels == ("adapter",) * 3


def test_bad_input(experts):
    with pytest.raises(MergeError, match="nothing to mix"):
        Mixture(())
    with pytest.raises(MergeError, match=r"one strength[\s\S]*expected: +3[\s\S]*found: +2"):
        Mixture(experts, strengths=(1, 2))
    for bad in ({"strengths": (1, math.nan, 1)}, {"scale": math.inf}):
        with pytest.raises(MergeError, match="not a finite number"):
            Mixture(experts, **bad)
    with pytest.raises(MergeError, match=r"another number of LoRAs[\s\S]*expected: +2 LoRAs"):
        Mixture(experts, GateSet(2))
    with pytest.raises(MergeError, match=r"Output mixing[\s\S]*granularity layer"):
        Mixture(experts, mixing="output")


def test_switching_off(experts):
    gate = Gate(2, 3, GateSettings(reads="hidden"))
    with torch.no_grad():
        gate.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    whole = Mixture(experts, GateSet(3, gate.settings, {"": gate}), strengths=(1, 2, 3), scale=0.5)
    left = whole.without(1)
    assert left.experts == (experts[0], experts[2])
    assert left.strengths == (1, 3)
    assert left.scale == 0.5
    assert left.gates[""].bias.tolist() == [1.0, 3.0]
    assert whole.only([2, 0, 2]).experts == left.experts  # each once, in the mixture's order
    assert whole.only(range(3)) is whole
    with pytest.raises(MergeError, match="Every LoRA is switched off"):
        whole.without(0, 1, 2)
    for bad in (3, -1):
        with pytest.raises(MergeError, match=r"no such LoRA[\s\S]*0 \.\. 2"):
            whole.only([bad])


def test_one_left_under_softmax_has_all(experts):
    gate = Gate(2, 3, GateSettings(activation="softmax", reads="hidden"))
    left = Mixture(experts, GateSet(3, gate.settings, {"": gate})).without(0, 2)
    assert torch.equal(left.gates[""](torch.randn(4, 2)), torch.ones(4, 1))
    # also without training: the share of one expert is 1
    untrained = Mixture(experts, GateSet(3, gate.settings)).without(0, 2)
    assert untrained.gates.even(torch.zeros(1)).tolist() == [[1.0]]
