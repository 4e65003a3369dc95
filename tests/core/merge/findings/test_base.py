"""Findings that compare LoRAs with the weights of their base model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from legomole.core.formats import BaseWeights
from legomole.core.lowrank import LowRank
from legomole.core.merge.findings.base import findings_with_base, lowest_cosine
from safetensors.torch import save_file

from .hand_made import WIDTH, adapter, part

# singular values 32, 31, .. 1, whose vectors are unit vectors
W = torch.diag(torch.arange(WIDTH, 0, -1).float())


@pytest.fixture
def base(tmp_path: Path) -> BaseWeights:
    save_file({"blocks.0.attn.q.weight": W}, tmp_path / "base.safetensors")
    return BaseWeights(tmp_path / "base.safetensors")


def kinds(base: BaseWeights, lora, weight: float = 1.0) -> list[str]:
    return [f.kind for f in findings_with_base([lora], [dict.fromkeys(lora.modules, weight)], base)]


def test_larger_than_the_weights(base: BaseWeights):
    norm = float(W.norm())
    lora = adapter("a", part(norm))
    (finding,) = findings_with_base([lora], [dict.fromkeys(lora.modules, 1.01)], base)
    assert finding.kind == "larger_than_weights"
    assert finding.value == pytest.approx(1.01)
    assert kinds(base, lora, 0.99) == []
    assert kinds(base, lora, 0.0) == []


def test_an_intruder():
    """A direction spread over all of the base's has a cosine of 1 / sqrt(32) with each, if it is far larger."""
    spread = torch.ones(WIDTH, 1) / WIDTH**0.5
    delta = 1e5 * spread @ torch.eye(WIDTH)[-1:]
    assert lowest_cosine(W.double(), delta.double()) == pytest.approx(WIDTH**-0.5, abs=0.01)


def test_intruders_are_reported_below_peft_s_cosine(base: BaseWeights):
    spread = torch.ones(WIDTH, 1) / WIDTH**0.5
    lora = adapter("a", LowRank(torch.eye(WIDTH)[-1:], 60 * spread))
    (finding,) = findings_with_base([lora], [dict.fromkeys(lora.modules, 1.0)], base)
    assert finding.kind == "intruder"
    assert finding.value < finding.threshold == 0.5
    assert finding.layers == ("blocks.0.attn.q",)


def test_directions_of_the_base_are_no_intruders(base: BaseWeights):
    assert kinds(base, adapter("a", part(60, 60))) == []


def test_the_measure_is_peft_s(base: BaseWeights):
    """PEFT: singular vectors of W + delta whose largest |cosine| with those of W is below 0.5, of the first ten."""
    g = torch.Generator().manual_seed(0)
    for size in (1.0, 10.0, 60.0):
        delta = (
            size
            * torch.randn(WIDTH, 2, generator=g, dtype=torch.float64)
            @ torch.randn(2, WIDTH, generator=g, dtype=torch.float64)
        )
        U = torch.linalg.svd(W.double()).U
        changed = torch.linalg.svd(W.double() + delta).U[:, :10]
        assert lowest_cosine(W.double(), delta) == pytest.approx(float((changed.T @ U).abs().max(1).values.min()))
