"""Maps: what is accepted, and resizing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legomole.core.errors import MergeError
from legomole.core.mole.regions.maps import checked_maps, resized


@pytest.mark.parametrize(
    ("map_", "message"),
    [
        (torch.zeros(3), "is not a map"),
        (torch.zeros(1, 2, 3, 4), "is not a map"),
        (torch.zeros(0, 3), "is not a map"),
        (torch.full((2, 2), 1.5), r"outside of 0 .. 1.\n.*\n  found:    1.5 .. 1.5"),
        (torch.full((2, 2), -0.1), "outside of 0 .. 1"),
        (torch.full((2, 2), float("nan")), "outside of 0 .. 1"),
    ],
)
def test_wrong_maps(map_: torch.Tensor, message: str) -> None:
    with pytest.raises(MergeError, match=message) as error:
        checked_maps([None, map_], ["heart", "ember"])
    assert "ember" in str(error.value)


def test_one_map_per_lora() -> None:
    with pytest.raises(MergeError, match="Every LoRA needs a region"):
        checked_maps([None], ["heart", "ember"])
    assert checked_maps([], ["heart", "ember"]) == (None, None)


@pytest.mark.parametrize("map_", [torch.ones(2, 2), torch.ones(3, 2, 2), [[1, 1]], torch.ones(2, 2, dtype=torch.uint8)])
def test_ones_are_no_map(map_: Any) -> None:
    assert checked_maps([map_], ["heart"]) == (None,)


def test_halving_is_the_mean_and_doubling_is_linear() -> None:
    map_ = torch.tensor([[0.0, 1, 1, 0], [1, 1, 0, 0]])[None, None]
    assert resized(map_, (1, 1, 2))[0, 0].tolist() == [[0.75, 0.25]]
    assert resized(torch.tensor([[[[0.0, 1.0]]]]), (1, 1, 4))[0, 0].tolist() == [[0, 0.25, 0.75, 1]]


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 3))
def test_a_constant_stays_constant(height: int, width: int, new_height: int, new_width: int, frames: int) -> None:
    maps = torch.full((2, 1, height, width), 0.375)
    found = resized(maps, (frames, new_height, new_width))
    assert found.shape == (2, frames, new_height, new_width)
    torch.testing.assert_close(found, torch.full_like(found, 0.375))
