"""Features: gates of the right size that start even, for everything that gates read."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings, feature_spread
from legomole.core.mole.mixture import Mixture
from legomole.core.train.features import standardise_features

from ..merge.pools import close
from ..mole.kinds import READS
from ..mole.mixtures import Values, lora, random_detector
from ..mole.models import FEATURES, Transformer, UNet, call, inputs


def mixture(model, reads: str, granularity: str = "layer", activation: str = "softmax") -> Mixture:
    settings = GateSettings(reads=reads, granularity=granularity, activation=activation)
    detector = random_detector(2, FEATURES) if reads == "text" else None
    return Mixture((lora(model, 1), lora(model, 2, 3)), GateSet(2, settings, detector=detector))


@pytest.mark.parametrize("reads", READS)
def test_features_have_mean_0_and_deviation_1(reads):
    model = UNet()
    batches = [inputs(model, 4, seed) for seed in range(3)]
    read: dict[str, list[torch.Tensor]] = {}
    with torch.no_grad(), attach(model, mixture(model, reads)) as at:
        with at.watch_inputs(lambda scope, f, _: read.setdefault(scope, []).append(f)):
            for x, text in batches:
                call(model, x, text)
        gates = standardise_features(at, lambda: [call(model, *batch) for batch in batches])
        assert at.bank.gates is gates
        layers = {name: gates[name].layer for name in gates.names}
    assert set(gates.names) == set(read)
    inner = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert layers[f"{inner}.attn"] == (f"{inner}.attn.to_q" if reads == "hidden" else "")
    assert layers["down_blocks.0.resnets.0"] == ""  # reads the block's input
    for name, parts in read.items():
        f = torch.cat(parts).double()
        mean, spread = f.mean(0), feature_spread(f.var(0, unbiased=False))
        gate = gates[name]
        assert torch.allclose(gate.mean.double(), mean, atol=1e-5)
        assert torch.allclose(gate.spread.double(), spread * max(1, f.shape[1] / 64), rtol=1e-3, atol=1e-5)
        assert (gate.owner is None) == (reads in ("text-mean", "hidden"))
        assert gate.features == f.shape[1]


def test_by_hand():
    """Text conditionings with means (1, .., 1) and (3, .., 3): mean 2, variance 1, floor 0.01."""
    model = Transformer(1)
    x, text = inputs(model)
    text = torch.stack([torch.full_like(text[0], 1.0), torch.full_like(text[0], 3.0)])
    with attach(model, mixture(model, "text-mean", "network")) as at:
        gate = standardise_features(at, lambda: [model(x, text), None])[""]
    assert gate.mean.tolist() == pytest.approx([2.0] * FEATURES)
    assert gate.spread.tolist() == pytest.approx([1.01**0.5] * FEATURES)


def test_presence_by_hand():
    """Texts of one token that score (2, -2) and (0, -2): presence of mean and spread by hand, floor 1 % of variance."""
    model = Transformer(1)
    x, _ = inputs(model)
    text = torch.zeros(2, 1, FEATURES)
    text[0, 0, 0] = text[1, 0, 1] = 1  # root mean square 1 / sqrt(6)
    weight = torch.zeros(2, FEATURES)
    weight[0, 0] = 2 / FEATURES**0.5
    detector = ConceptDetector(weight, torch.tensor([0.0, -2.0]), [["a"], ["b"]])
    mixed = Mixture(
        (lora(model, 1), lora(model, 2)), GateSet(2, GateSettings(granularity="network"), detector=detector)
    )
    with attach(model, mixed) as at:
        gates = standardise_features(at, lambda: [model(x, text), None])
    high, low = 1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))
    assert gates[""].mean.tolist() == pytest.approx([(high + 0.5) / 2, low])
    variance = ((high - 0.5) / 2) ** 2
    floor = 0.01 * variance / 2  # the other concept's variance is 0
    assert gates[""].spread.tolist() == pytest.approx([(variance + floor) ** 0.5, floor**0.5], rel=1e-3)
    assert gates.detector is not None  # the same words and weights
    assert torch.equal(gates.detector.weight, weight)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softmax-null"])
def test_gates_start_even(activation):
    model = Transformer(1)
    x, text = inputs(model)
    mixed = mixture(model, "hidden", activation=activation)
    observed = Values()
    with torch.no_grad(), attach(model, mixed) as at:
        before = model(x, text)
        standardise_features(at, lambda: [model(x, text)])
        with at.watch(observed):
            assert close(model(x, text), before)
    even = mixed.gates.settings.even(2)
    assert all(torch.allclose(value, torch.full_like(value, even)) for value in observed.values.values())


def test_measuring_starts_from_even_gates():
    """A gate's input depends on earlier gates: measuring a second time must give the same features."""
    model = Transformer(1)
    x, text = inputs(model)
    with torch.no_grad(), attach(model, mixture(model, "hidden")) as at:
        first = standardise_features(at, lambda: [model(x, text)])
        for name in first.names:
            first[name].bias.copy_(torch.tensor([5.0, -5.0]))
        second = standardise_features(at, lambda: [model(x, text)])
        assert all(torch.equal(first[name].mean, second[name].mean) for name in first.names)


def test_bad_input():
    model = Transformer(1)
    x, text = inputs(model)
    with attach(model, mixture(model, "flat")) as at:
        with pytest.raises(MergeError, match=r"size changes[\s\S]*\(25,\)[\s\S]*\(20,\)[\s\S]*one size"):
            standardise_features(at, lambda: [model(x, text), model(x[:, :4], text)])
        with pytest.raises(MergeError, match="did not reach a single gate"):
            standardise_features(at, lambda: None)
