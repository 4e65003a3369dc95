"""Findings about two LoRAs: each with a case above its threshold and one just below."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from legomole.core.lowrank import LowRank, concat, truncated_svd

from .hand_made import adapter, found, part


def random_part(seed: int, rank: int = 4, width: int = 64) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, width, generator=g), torch.randn(width, rank, generator=g))


def test_a_lora_and_its_copy_with_other_factors_scale_and_rank():
    original = random_part(0, 4)
    R = torch.randn(4, 4, generator=torch.Generator().manual_seed(9)) + 3 * torch.eye(4)
    regauged = LowRank(R @ original.A, original.B @ torch.linalg.inv(R) * 2, alpha=2.0)
    A, B = truncated_svd(original.A.double(), original.B.double(), 3)
    for copy in (regauged, LowRank(A, B)):
        (finding,) = found("duplicate", [adapter("a", original), adapter("b", copy)])
        assert finding.loras == ("a", "b")
        assert finding.value > 0.9


def test_alike_but_not_the_same():
    """Cosines 0.89 and 0.91 by hand: (4, x) and (4, 0) have 4 / sqrt(16 + x^2)."""
    for x, count in ((2.05, 0), (1.8, 1)):
        assert len(found("duplicate", [adapter("a", part(4, x)), adapter("b", part(4))])) == count


def test_the_same_in_the_layers_of_one_but_not_in_all():
    """Cosine over all layers 1 / sqrt(2)."""
    assert found("duplicate", [adapter("a", part(1)), adapter("b", part(1), part(1, first=3))]) == []


def test_a_copy_that_is_subtracted_is_a_copy():
    loras = [adapter(name, random_part(0)) for name in "ab"]
    assert len(found("duplicate", loras, [1, -1])) == 1
    assert found("opposed", loras, [1, -1]) == []


def test_a_part_of_a_merge():
    first, second = random_part(1), random_part(2)
    (finding,) = found("contained", [adapter("whole", concat([first, second], [0.8, 1.0])), adapter("part", first)])
    assert finding.loras == ("part", "whole")
    assert finding.value == pytest.approx(1, abs=1e-4)
    assert "0.8" in finding.text


def test_weights_do_not_change_what_is_contained():
    first, second = random_part(1), random_part(2)
    loras = [adapter("whole", concat([first, second], [1.0, 1.0])), adapter("part", first)]
    assert [f.loras for f in found("contained", loras, [0.1, -3])] == [("part", "whole")]


def test_nearly_a_part():
    """Within other's directions are 16 of (16 + x^2): 0.89 and 0.91; at 0.4 times it may share a subject only."""
    whole = adapter("whole", part(4, first=0), part(4, first=8))
    for x, count in ((1.4, 0), (1.2, 1)):
        assert len(found("contained", [whole, adapter("part", part(4, x))])) == count
    faint = adapter("whole", part(1.6), part(1.6, first=8))
    assert found("contained", [faint, adapter("part", part(4))]) == []


def test_the_same_directions_at_other_sizes_are_one_finding():
    """Each is within the other's directions; their cosine is 34 / 50 = 0.8."""
    assert len(found("contained", [adapter("a", part(4, 3)), adapter("b", part(3, 4))])) <= 1


def test_opposed_blocks():
    """Only block 1 is opposed, at cosine -1."""
    a = adapter("a", part(1), part(1), part(1))
    b = adapter("b", part(1, first=3), part(-1), part(1, first=3))
    (finding,) = found("opposed", [a, b])
    assert (finding.loras, finding.layers) == (("a", "b"), ("blocks.1.attn.q",))
    assert finding.value == pytest.approx(-1)
    assert "1 of 3 blocks (blocks.1)" in finding.text


def test_a_little_opposed():
    """Cosines -0.29 and -0.31, where chance reaches 4 / 32."""
    for x, count in ((3.3, 0), (3.06, 1)):  # -1 / sqrt(1 + x^2)
        assert len(found("opposed", [adapter("a", part(1, x)), adapter("b", part(-1))])) == count


def test_opposed_in_a_block_that_does_not_matter():
    """Block 1 holds 0.04 of 1 + 0.04 in both."""
    a, b = adapter("a", part(1), part(0.2)), adapter("b", part(1, first=3), part(-0.2))
    assert found("opposed", [a, b]) == []
    a, b = adapter("a", part(1), part(0.24)), adapter("b", part(1, first=3), part(-0.24))
    assert len(found("opposed", [a, b])) == 1


def test_opposed_by_chance():
    """In a layer of 4 x 4 weights random LoRAs have cosines with a standard deviation of 1 / 4."""
    small = LowRank(torch.eye(4)[:1], torch.eye(4)[:, :1])
    other = LowRank(torch.tensor([[-0.5, 0.75**0.5, 0, 0]]), torch.eye(4)[:, :1])
    assert found("opposed", [adapter("a", small), adapter("b", other)]) == []
    assert found("opposed", [adapter("a", small), adapter("b", replace(small, B=-small.B))]) == []


def test_many_loras_are_compared_as_wholes():
    loras = [adapter(f"l{i}", part(1, first=i)) for i in range(16)]
    loras.append(adapter("against", part(-1, first=3)))
    (finding,) = found("opposed", loras)
    assert finding.loras == ("l3", "against")
