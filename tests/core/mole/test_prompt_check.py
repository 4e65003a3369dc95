"""Warnings for prompts whose words and gates disagree."""

from __future__ import annotations

import pytest
import torch
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.prompt_check import prompt_warnings
from legomole.core.mole.router import route_gates, route_mean_gates
from torch import Tensor

LABELS = ("style", "love")
F = 4


def gates(
    activation: str = "sigmoid", words: tuple[list[str], ...] = (["ember style", "burning"], ["heart"])
) -> GateSet:
    """Open for the first feature (style) and the second (love)."""
    weight = torch.zeros(2, F)
    weight[0, 0] = weight[1, 1] = 8.0
    detector = ConceptDetector(weight, torch.full((2,), -8.0), words)
    return route_gates(detector, GateSettings(activation=activation), ["a", "b"])


def text(*concepts: int) -> Tensor:
    """Three tokens that are no concept, and these."""
    return torch.eye(F)[[2, 3, 2, *concepts]]


class TestAgreement:
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softmax-null"])
    def test_there_are_no_warnings(self, activation):
        for prompt, states in (
            ("a heart in Ember style", text(0, 1)),
            ("burning house", text(0)),
            ("hearts", text()),  # not the word
            ("", text(0, 1)),
            ("  ", text(0, 1)),
        ):
            assert prompt_warnings(prompt, states, gates(activation), LABELS) == []


class TestDisagreement:
    def test_a_named_lora_that_is_nearly_off(self):
        (warning,) = prompt_warnings("a heart in ember style", text(1), gates(), LABELS)
        assert "style is nearly off although the prompt has its words (ember style, burning)" in warning
        # the router's closed gate: 1.5 / (1 + e^4) = 0.027
        assert "its gate is 0.03 of 1 for the prompt 'a heart in ember style'" in warning

    def test_a_lora_that_is_on_without_its_words(self):
        (warning,) = prompt_warnings("a valentine", text(1), gates(), LABELS)
        assert "love is on although the prompt has none of its words (heart)" in warning
        assert "its gate is 1.00 of 1" in warning

    def test_both_at_once(self):
        found = prompt_warnings("ember style", text(1), gates(), LABELS)
        assert [warning.split()[0] for warning in found] == ["style", "love"]

    def test_half_open_gates_are_fine(self):
        half = gates()
        for name in half.names:
            with torch.no_grad():
                half[name].weight.zero_()
                half[name].bias.zero_()  # 0.75 of 1 for all
                half[name].bias.sub_(0.7)  # 1.5 / (1 + e^0.7) = 0.5
        assert prompt_warnings("a heart", text(), half, LABELS) == []

    def test_the_mean_over_all_gates_counts(self):
        mixed = gates()
        with torch.no_grad():
            mixed["a"].bias.add_(20)  # always open, so the mean is about (1.5 + 0) / 2
        (warning,) = prompt_warnings("a dog", text(), mixed, LABELS)[:1]
        assert "style is on" in warning
        assert "0.76 of 1" in warning

    def test_a_mask_leaves_tokens_out(self):
        states, mask = text(1), torch.tensor([True, True, True, False])
        assert prompt_warnings("a dog", states, gates(), LABELS, mask) == []
        assert len(prompt_warnings("a dog", states, gates(), LABELS)) == 1

    def test_with_a_null_expert_an_even_share_is_on_already(self):
        # open: 1 / (1 + e^-4 + e^-8) = 0.98; all open: 1 / (2 + e^-4) = 0.50 of 1, more than 0.7 times the even 1/3
        (warning,) = prompt_warnings("a dog", text(1), gates("softmax-null"), LABELS)
        assert "love is on" in warning
        assert "0.98 of 1" in warning
        both = prompt_warnings("x", text(0, 1), gates("softmax-null"), LABELS)
        assert ["0.50 of 1" in warning for warning in both] == [True, True]

    def test_a_softmax_is_on_even_where_nothing_is_named(self):
        assert prompt_warnings("a dog", text(), gates("softmax"), LABELS) == []
        (warning,) = prompt_warnings("a heart in ember style", text(1), gates("softmax"), LABELS)
        assert "style is nearly off" in warning

    def test_long_prompts_are_shortened(self):
        (warning,) = prompt_warnings("heart " + "very " * 40, text(), gates(), LABELS)
        assert "very v..'" in warning
        assert len(warning) < 200


class TestNothingToCheck:
    def test_a_lora_without_words(self):
        always = gates(words=([], ["heart"]))
        assert prompt_warnings("a heart", text(0, 1), always, LABELS) == []
        assert prompt_warnings("a heart", text(1), always, LABELS) == []

    def test_untrained_gates_and_gates_that_read_something_else(self):
        assert prompt_warnings("a heart", text(), GateSet(2), LABELS) == []
        settings = GateSettings(reads="hidden")
        hidden = GateSet(2, settings, {"": Gate(F, 2, settings)}, gates().detector)
        assert prompt_warnings("a heart", text(), hidden, LABELS) == []

    def test_old_gates_whose_words_are_unknown(self):
        states = torch.randn(4, F, generator=torch.Generator().manual_seed(0))
        asked = torch.tensor([[True, False], [False, True], [True, True], [False, False]])
        old = route_mean_gates(states, asked, GateSettings(reads="text-mean"), [""])
        assert prompt_warnings("a heart", text(), old, LABELS) == []

    def test_gradients_are_not_needed(self):
        with torch.enable_grad():
            assert prompt_warnings("a heart", text(1).bfloat16(), gates(), LABELS) == []
