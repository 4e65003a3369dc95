"""Findings in the singular values of one LoRA: each with a case at its threshold and one just below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from legomole.core.lowrank import LowRank
from legomole.core.merge.findings.spectrum import OVERFLOW, rank_for

from .hand_made import WIDTH, adapter, found, part


def test_a_spike_in_one_layer():
    """20 against 1 in its layer and 2 in the others: 20 / 2."""
    sound = part(2, 1, 1)
    (finding,) = found("spike", [adapter("a", sound, part(20, 1, 1), sound, sound)])
    assert (finding.loras, finding.layers, finding.level) == (("a",), ("blocks.1.attn.q",), "fault")
    assert finding.value == pytest.approx(10, rel=1e-4)
    assert finding.threshold == 8.1
    assert "10 times" in finding.text
    assert "cap 8" in finding.remedy


def test_not_quite_a_spike():
    """16.1 / 2 in the other layers; or 7.9 times the next one."""
    sound = part(2, 1, 1)
    assert found("spike", [adapter("a", sound, part(16.1, 1, 1), sound, sound)]) == []
    assert found("spike", [adapter("a", part(1, 1), part(79, 10), part(1, 1), part(1, 1))]) == []


def test_a_spike_does_not_depend_on_weight_or_scale():
    spiked = adapter("a", part(2, 1), replace(part(40, 2), alpha=1.0), part(2, 1))  # scale 1/2: 20 and 1
    (finding,) = found("spike", [spiked], [0.01])
    assert finding.value == pytest.approx(10, rel=1e-4)
    assert finding.layers == ("blocks.1.attn.q",)


def test_a_lora_of_one_direction_in_every_layer_has_no_spike_unless_it_is_tiny():
    steep = part(20, 1)
    assert found("spike", [adapter("a", steep, steep, steep, steep)]) == []
    (finding,) = found("spike", [adapter("a", steep)])
    assert finding.value == pytest.approx(20, rel=1e-4)


def test_rank_one_has_no_spike():
    assert found("spike", [adapter("a", part(1), part(100), part(1), part(1))]) == []


def test_dead_layers_are_one_finding_for_loras_that_share_them():
    dead = part(0, 0)
    sound = part(1, 1)
    (finding,) = found("dead", [adapter(name, sound, dead, sound, sound) for name in "ab"])
    assert (finding.loras, finding.layers, finding.value) == (("a", "b"), ("blocks.1.attn.q",), 0.25)
    assert finding.level == "note"


def test_a_faint_layer_is_not_dead():
    sound = part(1, 0)
    assert found("dead", [adapter("a", sound, part(2e-6, 0), sound)]) == []
    assert len(found("dead", [adapter("a", sound, part(0.5e-6, 0), sound)])) == 1


def test_unused_rank():
    """One of four units holds all energy, at rank 8; two of eight hold 99 % where the second has 1.1 %."""
    (finding,) = found("rank_unused", [adapter("a", part(1, rank=8), part(1, rank=8))])
    assert finding.value == pytest.approx(1 / 8)
    assert "rank 1 of 8" in finding.text
    assert len(found("rank_unused", [adapter("a", part(1, 0.12, rank=8))])) == 1


def test_used_rank():
    """Three of eight are more than a quarter; a rank of 7 is small."""
    assert found("rank_unused", [adapter("a", part(1, 1, 1, rank=8))]) == []
    assert found("rank_unused", [adapter("a", part(1, rank=7))]) == []


@pytest.mark.parametrize(("share", "rank"), [(0.5, 1), (0.64, 1), (0.65, 2), (1.0, 2)])
def test_the_rank_for_a_share(share: float, rank: int):
    """Squares 16 and 9 of 25."""
    assert rank_for([4.0, 3.0, 0.0], share) == rank


@pytest.mark.parametrize(("value", "count"), [(OVERFLOW * 1.001, 1), (OVERFLOW * 0.999, 0)])
def test_near_overflow(value: float, count: int):
    A, B = torch.zeros(1, WIDTH), torch.zeros(WIDTH, 1)
    A[0, 0], B[0, 0] = value, 1e-4
    findings = found("overflow", [adapter("a", LowRank(A, B))])
    assert [(f.layers, f.level) for f in findings] == [(("blocks.0.attn.q",), "fault")] * count
