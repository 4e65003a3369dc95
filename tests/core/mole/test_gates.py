"""Gates: the paper's equations by hand, masks in closed form, and losses of gate values."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import settings as rules
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.mole.gates import Gate, GateSet, GateSettings, balance_loss, entropy, feature_spread, rms_normalised
from pydantic import ValidationError

from .mixtures import random_detector

ACTIVATIONS = ("sigmoid", "softmax", "softmax-null")
seeds = st.integers(0, 10_000)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def random_gate(activation: str, features: int = 5, experts: int = 3, seed: int = 0, **kw) -> Gate:
    g = torch.Generator().manual_seed(seed)
    spread, mean = 0.5 + torch.rand(features, generator=g), torch.randn(features, generator=g)
    gate = Gate(features, experts, GateSettings(activation=activation), mean=mean, spread=spread, **kw)
    with torch.no_grad():
        for p in gate.parameters():
            p.add_(0.5 * torch.randn(p.shape, generator=g))
    return gate


class TestGate:
    """Features (3, 5), mean (1, 1), spread (2, 4): standardised (1, 1)."""

    f = torch.tensor([[3.0, 5.0]])

    def gate(self, activation: str, rows: list[list[float]], bias: list[float], tau: float = 1.0, **kw) -> Gate:
        settings = GateSettings(activation=activation, **kw)
        gate = Gate(2, 2, settings, mean=torch.tensor([1.0, 1.0]), spread=torch.tensor([2.0, 4.0]))
        with torch.no_grad():
            gate.weight.copy_(torch.tensor(rows))
            gate.bias.copy_(torch.tensor(bias))
            gate.log_temperature.fill_(math.log(tau))
        return gate

    def test_sigmoid_by_hand(self):
        # logits (1 + 2 - 1, 0 + 1 - 1) = (2, 0): 1.5 / (1 + e^-2) = 1.5 * 0.880797, 1.5 / 2
        gate = self.gate("sigmoid", [[1, 2], [0, 1]], [-1, -1])
        assert gate(self.f)[0].tolist() == pytest.approx([1.5 * 0.880797078, 0.75])

    def test_the_temperature_does_not_affect_sigmoids(self):
        gates = [self.gate("sigmoid", [[1, 2], [0, 1]], [-1, -1], tau) for tau in (1.0, 5.0)]
        assert torch.equal(gates[0](self.f), gates[1](self.f))
        assert not gates[0].log_temperature.requires_grad

    def test_softmax_with_temperature_by_hand(self):
        # logits (2, 0), tau 2: (e^1, e^0) / (e + 1) = (0.731059, 0.268941)
        gate = self.gate("softmax", [[1, 2], [0, 1]], [-1, -1], tau=2.0)
        assert gate(self.f)[0].tolist() == pytest.approx([0.731058579, 0.268941421])
        assert gate.log_temperature.requires_grad

    def test_softmax_with_a_null_expert_by_hand(self):
        # logits (log 1, log 2, log 5) without weights: shares (1, 2) / 8, the rest is the null expert's
        gate = self.gate("softmax-null", [[0, 0]] * 3, [math.log(1), math.log(2), math.log(5)])
        assert gate(self.f)[0].tolist() == pytest.approx([1 / 8, 2 / 8])

    @pytest.mark.parametrize(("activation", "value"), [("sigmoid", 1.0), ("softmax", 1 / 3), ("softmax-null", 1 / 4)])
    @pytest.mark.parametrize("ceiling", [1.5, 4.0])
    def test_a_new_gate_is_even_whatever_it_reads(self, activation, value, ceiling):
        settings = GateSettings(activation=activation, ceiling=ceiling)
        values = Gate(4, 3, settings)(torch.randn(5, 4))
        assert values.shape == (5, 3)
        assert values.flatten().tolist() == pytest.approx([value] * 15)
        assert settings.even(3) == value
        assert GateSet(3, settings).even(torch.zeros(1)).tolist() == [pytest.approx([value] * 3)]

    @given(seeds, st.sampled_from(["softmax", "softmax-null"]))
    @rules(max_examples=25, deadline=None)
    def test_softmax_shares_sum_to_one_but_for_the_null_experts(self, seed, activation):
        gate, f = random_gate(activation, seed=seed), torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        with torch.no_grad():
            e = (gate.logits(f).double() / gate.log_temperature.double().exp()).exp()
            nobodys = e[:, -1] / e.sum(1) if activation == "softmax-null" else torch.zeros(4)
            assert torch.allclose(gate(f).double().sum(1), 1 - nobodys.double(), atol=1e-5)

    @given(seeds, st.sampled_from(ACTIVATIONS), st.permutations(range(3)))
    @rules(max_examples=30, deadline=None)
    def test_permuting_the_experts_permutes_the_gates(self, seed, activation, order):
        gate, f = random_gate(activation, seed=seed), torch.randn(4, 5, generator=torch.Generator().manual_seed(seed))
        assert torch.allclose(gate.select(order)(f), gate(f)[:, order], atol=1e-6)

    def test_settings_are_checked(self):
        for bad in ({"ceiling": 1.0}, {"ceiling": math.inf}, {"reads": "noise"}, {"tau": 1}):
            with pytest.raises(ValidationError):
                GateSettings(**bad)


class TestSelect:
    @given(seeds, st.sets(st.integers(0, 3), min_size=1))
    @rules(max_examples=30, deadline=None)
    def test_softmax_shares_are_renormalised_in_proportion(self, seed, keep):
        keep = sorted(keep)
        gate, f = random_gate("softmax", experts=4, seed=seed), torch.randn(6, 5)
        whole = gate(f)[:, keep]
        assert torch.allclose(gate.select(keep)(f), whole / whole.sum(1, keepdim=True), atol=1e-5)

    def test_the_null_expert_keeps_its_place(self):
        # g_i = e_i / (e_0 + e_1 + e_2 + e_null); without expert 1: e_0 / (e_0 + e_2 + e_null) = g_0 / (1 - g_1)
        gate, f = random_gate("softmax-null"), torch.randn(6, 5)
        whole = gate(f)
        expected = whole[:, [0, 2]] / (1 - whole[:, 1:2])
        assert torch.allclose(gate.select([0, 2])(f), expected, atol=1e-6)

    def test_sigmoids_stay_as_they_are(self):
        gate, f = random_gate("sigmoid"), torch.randn(6, 5)
        assert torch.allclose(gate.select([2, 0])(f), gate(f)[:, [2, 0]], atol=1e-6)

    def test_softmax_of_one_left_is_exactly_one(self):
        assert torch.equal(random_gate("softmax").select([1])(torch.randn(6, 5)), torch.ones(6, 1))

    def test_features_of_an_expert_are_dropped_with_it(self):
        owner = torch.tensor([0, 1, 1, 2, 2])
        gate = random_gate("sigmoid", owner=owner)
        left = gate.select([0, 2])
        assert left.owner.tolist() == [0, 1, 1]
        for name in ("mean", "spread"):
            assert torch.equal(getattr(left, name), getattr(gate, name)[[0, 3, 4]])
        f = torch.randn(6, 5)
        expected = 1.5 * torch.sigmoid(
            ((f - gate.mean) / gate.spread)[:, [0, 3, 4]] @ gate.weight[[0, 2]][:, [0, 3, 4]].mT + gate.bias[[0, 2]]
        )
        assert torch.allclose(left(f[:, [0, 3, 4]]), expected, atol=1e-6)

    def test_features_are_sorted_by_expert_in_another_order_too(self):
        gate = random_gate("sigmoid", owner=torch.tensor([0, 1, 1, 2, 2]))
        turned, f = gate.select([2, 0, 1]), torch.randn(6, 5)
        assert turned.owner.tolist() == [0, 0, 1, 2, 2]
        assert torch.allclose(turned(f[:, [3, 4, 0, 1, 2]]), gate(f)[:, [2, 0, 1]], atol=1e-6)

    def test_flat_features_are_reordered_within_each_position(self):
        # two positions with units of experts (0, 1, 1): reordered within each position
        gate = random_gate("sigmoid", features=6, experts=2, owner=torch.tensor([0, 1, 1, 0, 1, 1]))
        turned, f = gate.select([1, 0]), torch.randn(4, 6)
        assert turned.owner.tolist() == [0, 0, 1, 0, 0, 1]
        assert torch.allclose(turned(f[:, [1, 2, 0, 4, 5, 3]]), gate(f)[:, [1, 0]], atol=1e-6)
        assert gate.select([1]).features == 4

    def test_a_selection_is_independent(self):
        gates = GateSet(3, GateSettings(reads="hidden"), {"a": random_gate("sigmoid")})
        copy, f = gates.copy(), torch.randn(2, 5)
        before = gates["a"](f)
        with torch.no_grad():
            copy["a"].weight.zero_()
        assert torch.equal(gates["a"](f), before)
        assert copy.names == ("a",)


class TestGateSet:
    @pytest.mark.parametrize("activation", ACTIVATIONS)
    def test_all_gates_at_once_equal_each_alone(self, activation):
        gates = {name: random_gate(activation, seed=i) for i, name in enumerate(("", "blocks.0", "blocks.1.attn"))}
        settings = GateSettings(activation=activation, reads="hidden")
        together, f = GateSet(3, settings, gates), torch.randn(4, 5)
        for value, gate in zip(together.values(f), gates.values(), strict=True):
            assert torch.allclose(value, gate(f), atol=1e-6)

    def test_gates_by_name(self):
        gate = random_gate("sigmoid")
        gates = GateSet(3, GateSettings(reads="hidden"), {"blocks.0": gate})
        assert gates["blocks.0"] is gate
        assert gates.get("blocks.1") is None
        assert gates.trained
        assert not GateSet(3).trained
        with pytest.raises(KeyError):
            gates["blocks.1"]

    def test_a_gate_of_another_number_of_experts_is_refused(self):
        with pytest.raises(MergeError, match=r"another number[\s\S]*blocks\.0[\s\S]*expected: +2[\s\S]*found: +3"):
            GateSet(2, GateSettings(), {"blocks.0": random_gate("sigmoid")})

    def test_gates_that_read_text_need_a_detector_of_as_many_experts(self):
        with pytest.raises(MergeError, match=r"need a concept detector[\s\S]*fit a detector"):
            GateSet(3, GateSettings(), {"": random_gate("sigmoid", 3)})
        with pytest.raises(
            MergeError, match=r"detector was made for another number[\s\S]*expected: +3[\s\S]*found: +2"
        ):
            GateSet(3, GateSettings(), {}, random_detector(2, 5))
        assert not GateSet(3, GateSettings()).trained  # untrained gates read nothing

    def test_what_they_read_of_a_text(self):
        text = torch.tensor([[[1.0, 3.0], [5.0, 7.0]]])
        detector = random_detector(3, 2)
        assert torch.equal(GateSet(3, GateSettings(), {}, detector).text_features(text, None), detector(text))
        mask = torch.tensor([[True, False]])
        found = GateSet(3, GateSettings(), {}, detector).text_features(text, mask)
        assert torch.allclose(found, detector(text[:, :1]))
        assert GateSet(3).text_features(text, None).tolist() == [[0.0, 0.0, 0.0]]  # no detector yet
        mean = GateSet(3, GateSettings(reads="text-mean"))
        for any_mask in (None, mask):  # as these gates always did
            assert mean.text_features(text, any_mask).tolist() == [[3.0, 5.0]]
        assert mean.text_features(text.half(), None).dtype == torch.float32

    def test_a_selection_has_the_detector_of_its_experts(self):
        text = torch.randn(2, 4, 5)
        detector = random_detector(3, 5, words=[["a"], ["b", "bb"], []])
        gates = GateSet(3, GateSettings(), {"": random_gate("sigmoid", 3, owner=torch.arange(3))}, detector)
        left = gates.select([2, 1])
        assert left.detector.words == ((), ("b", "bb"))
        f = left.text_features(text, None)
        assert torch.allclose(f, detector(text)[:, [2, 1]])
        assert left[""].features == 2

    def test_half_precision_features_are_widened(self):
        gate, f = random_gate("softmax"), torch.randn(4, 5).bfloat16()
        assert gate(f).dtype == torch.float32
        assert torch.equal(gate(f), gate(f.float()))


class TestLosses:
    def test_balance_by_hand(self):
        # two gates, two samples: q = mean of (.8, .2), (.6, .4), (.4, .6), (.2, .8) = (.5, .5); -log .25
        values = [torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([[0.4, 0.6], [0.2, 0.8]])]
        assert float(balance_loss(values)) == pytest.approx(math.log(4))
        # q = (.7, .3): -log .21
        assert float(balance_loss(values[:1])) == pytest.approx(-math.log(0.21))

    def test_balance_is_smallest_when_even_and_finite_when_one_is_off(self):
        def loss(p):
            return float(balance_loss([torch.tensor([[p, 1 - p]])]))

        assert loss(0.5) < loss(0.6) < loss(0.9) < loss(1.0) < math.inf

    def test_entropy_by_hand(self):
        # even: log 3. (1.5, 0, 0): 0. Not normalised (1, 1, 2) -> (1/4, 1/4, 1/2): 2 * log(4)/4 + log(2)/2 = 1.0397
        even, one, mixed = torch.ones(2, 3) / 7, torch.tensor([[1.5, 0, 0]]), torch.tensor([[1.0, 1.0, 2.0]])
        assert float(entropy([even])) == pytest.approx(math.log(3))
        assert float(entropy([one])) == pytest.approx(0, abs=1e-6)
        assert float(entropy([mixed])) == pytest.approx(1.5 * math.log(2))
        assert float(entropy([even, one])) == pytest.approx(math.log(3) / 2)


class TestNormalised:
    def test_by_hand(self):
        # root mean square of (3, 4): sqrt((9 + 16) / 2); a position ten times as large gives the same
        x = torch.tensor([[[3.0, 4.0], [30.0, 40.0]]])
        expected = [3 / math.sqrt(12.5), 4 / math.sqrt(12.5)]
        for row in rms_normalised(x)[0]:
            assert row.tolist() == pytest.approx(expected)
        assert torch.equal(rms_normalised(x.mT, 1), rms_normalised(x).mT)

    def test_zero_stays_zero_and_has_a_gradient(self):
        x = torch.zeros(1, 2, 3, requires_grad=True)
        y = rms_normalised(x)
        y.sum().backward()
        assert not y.any()
        assert x.grad is not None
        assert x.grad.isfinite().all()

    def test_half_precision_is_widened_before_it_is_squared(self):
        y = rms_normalised(torch.full((1, 4), 60_000.0, dtype=torch.float16))
        assert y.dtype == torch.float32
        assert y[0].tolist() == pytest.approx([1.0] * 4)


class TestFeatureSpread:
    def test_by_hand(self):
        # variances (0, 200, 400): the mean 200 gives a floor of 2
        spread = feature_spread(torch.tensor([0.0, 200.0, 400.0]))
        assert spread.tolist() == pytest.approx([math.sqrt(2), math.sqrt(202), math.sqrt(402)])

    def test_constant_features_are_not_scaled(self):
        assert feature_spread(torch.zeros(2)).tolist() == [1.0, 1.0]
