"""Key maps change no value: the mapped rows are rows of the dense delta."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError, MergeError
from legomole.core.layers.keymap import (
    MappedRows,
    ParameterSlice,
    apply_key_map,
    split_at_common_boundaries,
    unmapped_modules,
)
from legomole.core.lowrank import LowRank


def part(d_out: int, alpha: float | None = 1.0, seed: int = 0) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(2, 3, generator=g), torch.randn(d_out, 2, generator=g), alpha)


def test_a_split_shares_A_and_slices_B() -> None:
    qkv = part(6)
    found = apply_key_map(
        Adapter({"qkv": qkv, "other": part(4)}, {"qkv.bias": torch.arange(6.0)}),
        {"qkv": (MappedRows("q", ((0, 2),)), MappedRows("k", ((2, 4),)), MappedRows("v", ((4, 6),)))},
    )
    assert list(found.modules) == ["q", "k", "v", "other"]
    for i, name in enumerate("qkv"):
        assert found.modules[name].A is qkv.A
        assert torch.equal(found.modules[name].delta(), qkv.delta()[2 * i : 2 * i + 2])
        assert found.diffs[f"{name}.bias"].tolist() == [2 * i, 2 * i + 1]


def test_swapped_halves() -> None:
    found = apply_key_map(
        Adapter({"mod": part(4)}, {"mod.bias": torch.arange(4.0)}), {"mod": (MappedRows("m", ((2, 4), (0, 2))),)}
    )
    assert torch.equal(found.modules["m"].delta(), part(4).delta()[[2, 3, 0, 1]])
    assert found.diffs["m.bias"].tolist() == [2, 3, 0, 1]


def test_two_diffs_on_one_target_are_added() -> None:
    found = apply_key_map(
        Adapter({}, {"a.bias": torch.tensor([1.0, 2.0]), "b.bias": torch.tensor([10.0, 20.0])}),
        {"a": (MappedRows("b"),)},
    )
    assert found.diffs["b.bias"].tolist() == [11, 22]


def test_two_modules_on_one_target_are_added() -> None:
    a, b = part(4, seed=1), part(4, 3.0, seed=2)
    found = apply_key_map(Adapter({"to_q": a, "alias": b}), {"alias": (MappedRows("to_q"),)})
    torch.testing.assert_close(found.modules["to_q"].delta(), a.delta() + b.delta())


def test_rows_out_of_range() -> None:
    with pytest.raises(FormatError, match="out of range"):
        apply_key_map(Adapter({"x": part(4)}), {"x": (MappedRows("y", ((2, 6),)),)})


def test_unmapped_modules() -> None:
    adapters = [Adapter({"b": part(4), "a": part(4)}), Adapter({"c": part(4), "a": part(4)})]
    assert unmapped_modules(adapters, {"a": (MappedRows("x"),)}) == ["b", "c"]


def leaf(key: str, start: int, stop: int) -> str:
    return f"{key}[{start}:{stop}]"


def test_a_fused_layer_is_split_where_another_lora_splits_it() -> None:
    found = split_at_common_boundaries(
        {"qkv": ParameterSlice("w", 0, 6), "k": ParameterSlice("w", 2, 4), "other": ParameterSlice("u", 0, 3)}, leaf
    )
    assert found == {
        "qkv": (MappedRows("w[0:2]", ((0, 2),)), MappedRows("w[2:4]", ((2, 4),)), MappedRows("w[4:6]", ((4, 6),))),
        "k": (MappedRows("w[2:4]"),),
        "other": (MappedRows("u[0:3]"),),
    }


def test_a_permuted_layer_cannot_be_split() -> None:
    swap = ((2, 4), (0, 2))
    assert split_at_common_boundaries({"m": ParameterSlice("w", 0, 4, swap)}, leaf) == {
        "m": (MappedRows("w[0:4]", swap),)
    }
    with pytest.raises(MergeError, match="permuted"):
        split_at_common_boundaries({"m": ParameterSlice("w", 0, 4, swap), "n": ParameterSlice("w", 0, 2)}, leaf)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12)), min_size=1, max_size=5))
def test_split_slices_overlap_completely_or_not_at_all(spans: list[tuple[int, int]]) -> None:
    places = {f"m{i}": ParameterSlice("w", a, min(12, a + n)) for i, (a, n) in enumerate(spans)}
    found = split_at_common_boundaries(places, leaf)
    targets: dict[str, set[int]] = {}
    for name, pieces in found.items():
        place, rows = places[name], []
        for piece in pieces:
            cut = piece.rows or ((0, place.stop - place.start),)
            numbers = [place.start + n for a, b in cut for n in range(a, b)]
            assert targets.setdefault(piece.target, set(numbers)) == set(numbers)
            rows += numbers
        assert rows == list(range(place.start, place.stop))
    seen = [row for rows in targets.values() for row in rows]
    assert len(seen) == len(set(seen))
