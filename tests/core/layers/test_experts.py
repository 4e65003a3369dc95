"""Single experts and stacked experts under one name."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.layers.experts import unify_experts
from legomole.core.lowrank import LowRank


def part(d_out: int, d_in: int) -> LowRank:
    return LowRank(torch.randn(2, d_in), torch.randn(d_out, 2), 3.0)


def test_stacked_experts_get_the_names_of_single_ones() -> None:
    fused, down = part(6, 4), part(4, 3)
    stacked = Adapter({"m.experts.gate_up_proj.1of2": fused, "m.experts.down_proj.1of2": down, "m.q": part(2, 2)})
    single = Adapter({"m.experts.0.gate_proj": part(3, 4)})
    untouched, renamed = unify_experts([single, stacked])
    assert untouched is single
    assert sorted(renamed.modules) == ["m.experts.1.down_proj", "m.experts.1.gate_proj", "m.experts.1.up_proj", "m.q"]
    assert torch.equal(renamed.modules["m.experts.1.gate_proj"].delta(), fused.delta()[:3])
    assert torch.equal(renamed.modules["m.experts.1.up_proj"].delta(), fused.delta()[3:])
    assert torch.equal(renamed.modules["m.experts.1.down_proj"].delta(), down.delta())


def test_mixtral_names_its_projections_by_number() -> None:
    renamed = unify_experts(
        [Adapter({"m.experts.0.w1": part(3, 4)}), Adapter({"m.experts.gate_up_proj.0of2": part(6, 4)})]
    )
    assert sorted(renamed[1].modules) == ["m.experts.0.w1", "m.experts.0.w3"]


def test_adapters_without_single_experts_stay_as_they_are() -> None:
    stacked = Adapter({"m.experts.gate_up_proj.1of2": part(6, 4)})
    assert unify_experts([stacked])[0] is stacked


def test_another_parameter_has_no_single_layer() -> None:
    stacked = Adapter({"m.experts.gate_up_proj_bias.0of1": part(6, 4)})
    with pytest.raises(MergeError, match="without a counterpart"):
        unify_experts([stacked, Adapter({"m.experts.0.gate_proj": part(3, 4)})])
