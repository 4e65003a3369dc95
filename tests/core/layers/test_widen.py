"""Updates of a layer that another adapter widens."""

from __future__ import annotations

import torch
from legomole.core.adapter import Adapter
from legomole.core.layers.widen import widen_inputs
from legomole.core.lowrank import LowRank


def adapter(d_in: int, *shape: int) -> Adapter:
    extras = {"x.reshape_weight": torch.tensor(shape)} if shape else {}
    return Adapter({"x": LowRank(torch.ones(1, d_in), torch.ones(3, 1), 2.0)}, extras=extras)


def test_new_inputs_are_zero() -> None:
    narrow, wide, wider = widen_inputs([adapter(2), adapter(4, 3, 4), adapter(5, 3, 5)])
    assert narrow.modules["x"].A.tolist() == [[1, 1, 0, 0, 0]]
    assert wide.modules["x"].A.tolist() == [[1, 1, 1, 1, 0]]
    assert wider.modules["x"].A.tolist() == [[1, 1, 1, 1, 1]]
    assert narrow.modules["x"].scale == 2.0


def test_adapters_stay_as_they_are_without_a_shape_of_their_layer() -> None:
    adapters = [adapter(2), adapter(4, 3, 9), adapter(5)]
    assert all(map(lambda a, b: a is b, adapters, widen_inputs(adapters)))
