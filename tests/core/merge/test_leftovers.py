"""The parts of adapters that are not low rank: diffs are summed, extras carried."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.rank import Rank

from .adapters import named, part


def test_diffs_are_summed_with_the_weights():
    """A bias of 2 at weight 0.5 plus one of 10 at weight -1: 1 - 10 = -9."""
    a = named("a", {"m": part(1)}, diffs={"m.bias": torch.full((6,), 2.0)})
    b = named("b", {"m": part(1, seed=1)}, diffs={"m.bias": torch.full((6,), 10.0), "norm.weight": torch.ones(3)})
    result = merge([a, b], Concat(), [0.5, -1.0])
    assert torch.equal(result.adapter.diffs["m.bias"], torch.full((6,), -9.0))
    assert torch.equal(result.adapter.diffs["norm.weight"], -torch.ones(3))
    assert len([line for line in result.report.passed_on if line.startswith("m.bias (added")]) == 2


def test_diffs_of_different_shape_are_an_error():
    a = named("a", {"m": part(1)}, diffs={"norm.weight": torch.ones(3)})
    b = named("b", {"m": part(1)}, diffs={"norm.weight": torch.ones(4)})
    with pytest.raises(MergeError, match="different shapes") as caught:
        merge([a, b], Concat())
    assert caught.value.module == "norm.weight"


def test_a_diff_of_an_adapter_without_weight_is_left_out():
    a = named("a", {"m": part(1)})
    b = named("b", {"m": part(1)}, diffs={"norm.weight": torch.ones(3)})
    assert merge([a, b], Concat(), [1, 0]).adapter.diffs == {}


def test_extras_are_carried_and_conflicts_named():
    same, other = torch.arange(3.0), torch.ones(3)
    a = named("a", {"m": part(1)}, extras={"emb.x": same, "emb.y": same})
    b = named("b", {"m": part(1)}, extras={"emb.x": same.clone(), "emb.y": other, "emb.z": other})
    result = merge([a, b], Concat())
    assert {name: t.tolist() for name, t in result.adapter.extras.items()} == {
        "emb.x": same.tolist(),
        "emb.y": same.tolist(),
        "emb.z": other.tolist(),
    }
    assert result.report.dropped == ("emb.y of b: it cannot be added, and a has another one",)
    assert "DROPPED (1)" in result.report.text()


def test_an_adapter_of_nothing_but_extras_takes_part_unless_its_weight_is_zero(pair):
    only = named("only", {}, extras={"emb.x": torch.ones(3)})
    result = merge([pair[0], only], Concat(), [1, 0.5])
    assert list(result.adapter.extras) == ["emb.x"]
    assert result.report.passed_on == ("emb.x (unchanged, from only)",)
    left_out = merge([pair[0], only], Concat(), [1, 0])
    assert left_out.adapter.extras == {}
    assert left_out.report.notes == ("only has weight 0 and was left out",)


def test_adapters_without_modules_keep_their_diffs():
    norms = [
        named(label, {}, diffs={"norm.weight": torch.full((3,), value)}) for label, value in (("a", 1.0), ("b", 4))
    ]
    result = merge(norms, SVD(Rank(4)), [1, 0.5])
    assert result.adapter.diffs["norm.weight"].tolist() == [3.0, 3.0, 3.0]
    assert not result.adapter.modules


def test_diffs_take_the_requested_dtype_too():
    adapter = named("a", {"m": part(1)}, diffs={"m.bias": torch.full((6,), 2.0)}, extras={"emb.x": torch.ones(3)})
    merged = merge([adapter], Concat(), dtype=torch.float16).adapter
    assert merged.diffs["m.bias"].dtype == merged.modules["m"].dtype == torch.float16
    assert merged.extras["emb.x"].dtype == torch.float32  # carried untouched
