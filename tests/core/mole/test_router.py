"""The prompt router: words found in prompts, and gates that act like the router."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSettings, feature_spread
from legomole.core.mole.router import concept_patterns, concepts_in, route_gates, route_mean_gates, routed_values

ASKED = torch.tensor([[True, False], [False, True], [True, True], [False, False]])


class TestNamed:
    def test_whole_words_ignoring_case(self):
        prompts = ["An Ember style cat", "embers", "ember, heart-shaped", "in remember style", "(ember:1.2) HEART", ""]
        found = concepts_in(prompts, [["ember"], ["heart", "love heart"]])
        assert found.tolist() == [
            [True, False], [False, False], [True, True], [False, False], [True, True], [False, False],
        ]  # fmt: skip

    def test_phrases_punctuation_and_other_scripts(self):
        prompts = ["a love heart", "love of the heart", "<sks> c++ dog", "ein Café", "一只 猫"]
        found = concepts_in(prompts, [["love heart"], ["<sks>"], ["C++ "], ["café"], ["猫"]])
        assert found.int().tolist() == [
            [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [0, 1, 1, 0, 0], [0, 0, 0, 1, 0], [0, 0, 0, 0, 1],
        ]  # fmt: skip

    def test_without_prompts_or_concepts(self):
        assert concepts_in([], [["a"]]).shape == (0, 1)
        assert concepts_in(["a"], []).shape == (1, 0)


class TestPatterns:
    def test_where_the_words_stand(self):
        style, other = concept_patterns([" ember style ", "C++"])
        found = [m.span() for m in style.finditer("Ember Style, ember stylex, (ember style:1.2)")]
        assert found == [(0, 11), (28, 39)]
        assert [m.span() for m in other.finditer("c++, xc++")] == [(0, 3)]


class TestRoutedValues:
    @pytest.mark.parametrize(
        ("activation", "expected"),
        [
            ("sigmoid", [[1, 0], [0, 1], [1, 1], [0, 0]]),
            ("softmax", [[1, 0], [0, 1], [0.5, 0.5], [0.5, 0.5]]),
            ("softmax-null", [[1, 0], [0, 1], [0.5, 0.5], [0, 0]]),
        ],
    )
    def test_by_hand(self, activation, expected):
        assert routed_values(ASKED, GateSettings(activation=activation)).tolist() == expected

    def test_several_concepts_together_are_louder_where_compose_says_so(self):
        found = routed_values(ASKED, GateSettings(), compose=1.2)
        torch.testing.assert_close(found, torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.2, 1.2], [0.0, 0.0]]))
        shares = routed_values(ASKED, GateSettings(activation="softmax"), compose=1.2)
        assert torch.equal(shares, routed_values(ASKED, GateSettings(activation="softmax")))


class TestCompose:
    @pytest.mark.parametrize("n", [2, 3, 4])
    def test_gates_open_to_one_alone_and_to_compose_for_all_together(self, n):
        detector = ConceptDetector(torch.zeros(n, 8), torch.zeros(n), [[str(i)] for i in range(n)])
        settings = GateSettings()
        gate = route_gates(detector, settings, ["a"], compose=1.2)["a"]

        def values(scores: torch.Tensor) -> torch.Tensor:
            return (settings.ceiling * torch.sigmoid(gate.weight[:n] @ scores + gate.bias[:n])).detach()

        for i, scores in enumerate(torch.eye(n)):
            alone = values(scores)
            assert alone[i] == pytest.approx(1, abs=1e-5)
            assert float(alone[[j for j in range(n) if j != i]].max()) < 0.06
        torch.testing.assert_close(values(torch.ones(n)), torch.full((n,), 1.2))
        assert float(values(torch.zeros(n)).max()) < 0.03

    def test_a_value_above_the_ceiling_becomes_nearly_the_ceiling(self):
        detector = ConceptDetector(torch.zeros(2, 8), torch.zeros(2), [["a"], ["b"]])
        gate = route_gates(detector, GateSettings(ceiling=1.1), ["a"], compose=2.0)["a"]
        together = 1.1 * torch.sigmoid(gate.weight[:2] @ torch.ones(2) + gate.bias[:2]).detach()
        torch.testing.assert_close(together, torch.full((2,), 0.98 * 1.1))


class TestRouteGates:
    """Presence of two concepts: tokens score 4 * 4 - 8 = 8 if they are one, -8 if not."""

    def detector(self) -> ConceptDetector:
        return ConceptDetector(4 * torch.eye(2, 16), torch.full((2,), -8.0), [["ember"], ["heart"]])

    def text(self) -> torch.Tensor:
        """Four texts of four tokens that name the concepts of `ASKED`."""
        return torch.eye(16)[torch.tensor([[0, 5, 9, 6], [7, 1, 9, 9], [1, 4, 0, 5], [3, 4, 8, 2]])]

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softmax-null"])
    def test_act_as_the_router_does(self, activation):
        settings = GateSettings(activation=activation)
        gates = route_gates(self.detector(), settings, ["a", "b"])
        assert gates.names == ("a", "b")
        with torch.no_grad():
            f = gates.text_features(self.text(), None)
            one, other = gates.values(f)
        assert torch.equal(one, other)
        assert torch.allclose(one, routed_values(ASKED, settings), atol=0.03)

    def test_sigmoids_by_hand(self):
        # closed: a logit of -4; open: 3 sigmoid(y) = 1, so y = -log 2; in between: a straight line in the presence
        gate = route_gates(self.detector(), GateSettings(ceiling=3.0), [""])[""]
        with torch.no_grad():
            found = gate(torch.tensor([[0.0, 1.0], [0.5, 0.5]]))
        assert found[0].tolist() == pytest.approx([3 / (1 + math.exp(4)), 1.0])
        assert found[1].tolist() == pytest.approx([3 / (1 + math.exp(2 + math.log(2) / 2))] * 2)

    def test_softmax_with_a_null_expert_by_hand(self):
        # logits: 0 if named, -8 if not, -4 for no expert
        gate = route_gates(self.detector(), GateSettings(activation="softmax-null"), [""])[""]
        with torch.no_grad():
            found = gate(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        total = 1 + math.exp(-8) + math.exp(-4)
        assert found[0].tolist() == pytest.approx([1 / total, math.exp(-8) / total])
        assert found[1].tolist() == pytest.approx([math.exp(-8) / (2 * math.exp(-8) + math.exp(-4))] * 2)

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softmax-null"])
    def test_fewer_experts_are_routed_alike(self, activation):
        """Features belong to the experts, so that those of switched-off ones are dropped."""
        settings = GateSettings(activation=activation)
        left = route_gates(self.detector(), settings, ["a"]).select([1])
        with torch.no_grad():
            (found,) = left.values(left.text_features(self.text(), None))
        assert torch.allclose(found, routed_values(ASKED[:, 1:], settings), atol=0.03)

    def test_a_concept_beyond_77_tokens_and_behind_sixty_words(self):
        gates = route_gates(self.detector(), GateSettings(), [""])
        filler = torch.eye(16)[2:].repeat(12, 1)[:160]
        for place in (0, 60, 100, 159):
            text = filler.clone()
            text[place] = torch.eye(16)[1]
            with torch.no_grad():
                (found,) = gates.values(gates.text_features(text[None], None))
            assert found[0].tolist() == pytest.approx([0, 1], abs=0.03)

    def test_gates_that_read_something_else(self):
        for other in ("hidden", "text-mean"):
            with pytest.raises(MergeError, match=rf"for gates that read the text[\s\S]*found: +{other}"):
                route_gates(self.detector(), GateSettings(reads=other), [""])


class TestRouteMeanGates:
    """Gates that read the mean of the text, as the first files have them."""

    def text(self) -> torch.Tensor:
        return torch.randn(4, 40, generator=torch.Generator().manual_seed(0))

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softmax-null"])
    def test_act_as_the_router_does(self, activation):
        settings = GateSettings(activation=activation, reads="text-mean")
        gates = route_mean_gates(self.text(), ASKED, settings, ["a", "b"])
        assert gates.names == ("a", "b")
        wanted = routed_values(ASKED, settings)
        with torch.no_grad():
            found = gates["a"](self.text())
        assert torch.equal(found, gates["b"](self.text()).detach())
        assert float((found - wanted).abs().max()) < 0.15

    def test_equal_the_ridge_regression(self):
        """route_mean_gates solves the dual form (prompts x prompts), the test the primal form (features x features)."""
        text, ridge = self.text().double(), 3.0
        gate = route_mean_gates(self.text(), ASKED, GateSettings(ceiling=3.0, reads="text-mean"), [""], ridge=ridge)[""]
        mean, spread = text.mean(0), feature_spread(text.var(0, unbiased=False))
        X = (text - mean) / spread
        # at 1 = 3 sigmoid(y): y = -log 2; off: -4; the bias is the mean over all: half of the prompts ask
        Y = torch.where(ASKED, -math.log(2.0), -4.0).double()
        bias = Y.mean(0)
        W = torch.linalg.solve(X.mT @ X + ridge * torch.eye(40, dtype=X.dtype), X.mT @ (Y - bias)).mT
        assert torch.allclose(gate.weight.double(), W, atol=1e-5)
        assert torch.allclose(gate.bias.double(), bias, atol=1e-6)
        assert torch.allclose(gate.mean.double(), mean, atol=1e-6)
        assert torch.allclose(gate.spread.double(), spread, atol=1e-6)

    def test_bad_input(self):
        settings = GateSettings(reads="text-mean")
        for other in ("hidden", "text"):
            with pytest.raises(MergeError, match=rf"do not read the mean of the text[\s\S]*found: +{other}"):
                route_mean_gates(self.text(), ASKED, GateSettings(reads=other), [""])
        with pytest.raises(MergeError, match="LoRA number 2 is asked for by no prompt"):
            route_mean_gates(self.text(), ASKED & torch.tensor([True, False]), settings, [""])
        with pytest.raises(MergeError, match="LoRA number 1 is asked for by every prompt"):
            route_mean_gates(self.text(), ASKED | torch.tensor([True, False]), settings, [""])
