"""Findings about sizes: each with a case above its threshold and one just below."""

from __future__ import annotations

import pytest

from .hand_made import adapter, found, part


def test_loud_and_quiet():
    """Norms sqrt(2) * 4.1 and sqrt(2)."""
    loras = [adapter("loud", part(4.1), part(4.1)), adapter("quiet", part(1, first=4), part(1, first=4))]
    (finding,) = found("loudness", loras)
    assert finding.loras == ("loud", "quiet")
    assert finding.value == pytest.approx(4.1, rel=1e-5)
    assert "4.1 times as loud" in finding.text
    assert found("loudness", loras, [0.96, 1]) == []
    assert found("loudness", loras, [1, 2]) == []


def test_loudness_at_a_negative_weight():
    loras = [adapter("a", part(1)), adapter("b", part(1, first=4))]
    (finding,) = found("loudness", loras, [-5, 1])
    assert finding.loras == ("a", "b")


def test_a_loud_text_encoder():
    text = {"lora_te1_text_model_encoder_layers_0_mlp_fc1": part(3.1)}
    (finding,) = found("text_encoder_loud", [adapter("a", part(1), part(1), **text)])
    assert finding.value == pytest.approx(3.1, rel=1e-5)
    assert finding.layers == tuple(text)
    assert "0.32" in finding.remedy
    assert found("text_encoder_loud", [adapter("a", part(1.1), part(1.1), **text)]) == []


def test_a_text_encoder_alone_is_not_loud():
    assert found("text_encoder_loud", [adapter("a", lora_te_text_model_encoder_layers_0_mlp_fc1=part(9))]) == []
