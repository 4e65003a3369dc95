"""The share of an adapter that a file keeps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.formats.loss import energy_kept
from legomole.core.formats.writing import cast_adapter
from legomole.core.lowrank import LowRank


def part(*A: float, alpha: float | None = None, lost: float = 0.0) -> LowRank:
    return LowRank(torch.tensor([A]), torch.tensor([[1.0], [0.0]]), alpha, lost=lost)


def test_by_hand() -> None:
    original = Adapter({"x": part(3.0, 4.0), "y": part(0.0, 1.0, alpha=2.0)}, {"z.bias": torch.tensor([1.0])})
    assert energy_kept(original, original) == 1.0
    assert energy_kept(original, Adapter({"x": part(3.0, 0.0), "y": part(0.0, 2.0)}, original.diffs)) == 1 - 16 / 30
    assert energy_kept(original, Adapter({"x": part(3.0, 4.0)})) == 1 - 5 / 30
    assert energy_kept(Adapter({"x": part(1.0, lost=3.0)}), Adapter({"x": part(1.0)})) == 0.25
    assert energy_kept(Adapter({"x": part(0.0)}), Adapter({"x": part(0.0)})) == 1.0


@pytest.mark.parametrize(("dtype", "step"), [(torch.float16, 2**-11), (torch.bfloat16, 2**-8)])
def test_rounding_is_measured_by_the_dense_definition(dtype: torch.dtype, step: float) -> None:
    generator = torch.Generator().manual_seed(0)
    whole = LowRank(torch.randn(6, 40, generator=generator), torch.randn(30, 6, generator=generator), 3.0)
    original = Adapter({"x": whole}, {"x.bias": torch.randn(30, generator=generator)})
    rounded = cast_adapter(original, dtype)
    deltas = [a.modules["x"].scale * a.modules["x"].B.double() @ a.modules["x"].A.double() for a in (original, rounded)]
    error = (deltas[0] - deltas[1]).square().sum() + (original.diffs["x.bias"] - rounded.diffs["x.bias"]).square().sum()
    total = deltas[0].square().sum() + original.diffs["x.bias"].square().sum()
    assert 1 - energy_kept(original, rounded) == pytest.approx(float(error / total), rel=1e-6)
    assert 0 < 1 - energy_kept(original, rounded) < step**2


def test_a_low_rank_update_written_as_part_of_a_full_difference_is_kept() -> None:
    full = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    written = Adapter({}, {"x.weight": torch.tensor([[4.0, 4.0], [0.0, 1.0]])})
    assert energy_kept(Adapter({"x": part(3.0, 4.0)}, {"x.weight": full}), written) == 1.0


def test_padded_ranks_lose_nothing() -> None:
    padded = replace(part(1.0, 2.0), A=torch.tensor([[1.0, 2.0], [0.0, 0.0]]), B=torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert energy_kept(Adapter({"x": part(1.0, 2.0)}), Adapter({"x": padded})) == 1.0
