"""ComfyUI's patches as data: the rows they change, and the common names of several LoRAs."""

from __future__ import annotations

import torch
from legomole.core.adapter import Adapter
from legomole.core.layers.keymap import ParameterSlice, apply_key_map
from legomole.core.lowrank import LowRank
from legomole.nodes.comfy.patches import LoaderNames, find_common_names, fuse_unnamed, slice_of, to_low_rank

KEY = "diffusion_model.block.qkv.weight"
KEY_MAP = {
    "lora_unet_block_qkv": KEY,
    "diffusion_model.block.qkv": KEY,
    "lora_transformer_block_to_q": (KEY, (0, 0, 2)),
    "transformer.block.to_q": (KEY, (0, 0, 2)),
    "transformer.block.to_k": (KEY, (0, 2, 2)),
    "transformer.block.to_v": (KEY, (0, 4, 2)),
    "diffusion_model.block.q_and_k": (KEY, (0, 0, 4)),
}
NAMES = LoaderNames(KEY_MAP)


def row_count(key: str) -> int:
    return 6


def swap(weight: torch.Tensor) -> torch.Tensor:
    first, second = weight.chunk(2)
    return torch.cat([second, first])


def part(d_out: int, rank: int = 2, seed: int = 0) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, 5, generator=generator), torch.randn(d_out, rank, generator=generator))


def test_slices() -> None:
    assert slice_of(KEY, 6) == ParameterSlice(KEY, 0, 6)
    assert slice_of((KEY, (0, 2, 2)), 2) == ParameterSlice(KEY, 2, 4)
    assert slice_of((KEY, None, swap), 4) == ParameterSlice(KEY, 0, 4, ((2, 4), (0, 2)))


def test_targets_that_are_more_than_a_reordering_have_no_slice() -> None:
    """Functions that scale or drop rows, targets of columns, and updates with another number of rows."""
    assert slice_of((KEY, None, lambda weight: 2 * weight), 4) is None
    assert slice_of((KEY, None, lambda weight: weight[:2]), 4) is None
    assert slice_of((KEY, (1, 0, 2)), 2) is None
    assert slice_of((KEY, (0, 0, 3)), 2) is None


def test_order_is_what_the_function_does_to_an_update() -> None:
    rows = slice_of((KEY, None, swap), 6)
    assert rows is not None
    assert rows.order is not None
    update = part(6)
    torch.testing.assert_close(update.rows(rows.order).delta(), swap(update.delta()))


def test_comfyuis_own_names_are_preferred_then_diffusers() -> None:
    assert NAMES.of_parameter(KEY) == "diffusion_model.block.qkv"
    assert NAMES.of_rows(KEY, 0, 2) == "transformer.block.to_q"
    assert NAMES.of_rows(KEY, 0, 3) is None
    assert NAMES.of_parameter("no.such.weight") == "no.such"


def test_tucker_core_is_folded_into_A() -> None:
    """delta[o, i, h, w] = alpha/r sum_mn up[o, m] mid[m, n, h, w] down[n, i]."""
    up, mid, down = torch.randn(6, 2, 1, 1), torch.randn(2, 2, 3, 3), torch.randn(2, 4, 1, 1)
    delta = torch.einsum("om,mnhw,ni->oihw", up[..., 0, 0], mid, down[..., 0, 0])
    merged = to_low_rank((up, down, 1.0, mid, None, None), (3, 3))
    assert merged.kernel == (3, 3)
    torch.testing.assert_close(merged.delta(), 0.5 * delta.flatten(1))


def test_fused_layers_stay_fused_if_no_lora_splits_them() -> None:
    slices = {"a": ParameterSlice(KEY, 0, 6), "b": ParameterSlice("other.weight", 0, 6)}
    common = find_common_names(slices, NAMES, row_count)
    assert [piece.target for piece in common.key_map["a"]] == ["diffusion_model.block.qkv"]
    assert common.unnamed == {}


def test_fused_layer_is_split_into_named_rows_if_one_lora_splits_it() -> None:
    """One LoRA changes q alone: the other's fused layer becomes q, k and v, which have names; q_and_k is split too."""
    slices = {"whole": ParameterSlice(KEY, 0, 6), "q": ParameterSlice(KEY, 0, 2), "q_and_k": ParameterSlice(KEY, 0, 4)}
    common = find_common_names(slices, NAMES, row_count)
    q, k, v = (f"transformer.block.to_{x}" for x in "qkv")
    assert [piece.target for piece in common.key_map["whole"]] == [q, k, v]
    assert [piece.target for piece in common.key_map["q"]] == [q]
    assert [piece.target for piece in common.key_map["q_and_k"]] == [q, k]
    assert common.unnamed == {}


def test_unnamed_rows_are_fused_into_the_whole_layer() -> None:
    """Rows 0 .. 1 and 1 .. 6 have no names. The delta of the whole layer stays the same."""
    names = LoaderNames({"diffusion_model.block.qkv": KEY})
    slices = {"whole": ParameterSlice(KEY, 0, 6), "first": ParameterSlice(KEY, 0, 1)}
    common = find_common_names(slices, names, row_count)
    whole, first = part(6, 2), part(1, 3, seed=1)
    renamed = [
        apply_key_map(Adapter({"whole": whole}), common.key_map),
        apply_key_map(Adapter({"first": first}), common.key_map),
    ]
    assert set(common.unnamed) == {"diffusion_model.block.qkv[0:1]", "diffusion_model.block.qkv[1:6]"}
    assert set(renamed[0].modules) == set(common.unnamed)
    fused = [fuse_unnamed(adapter, common, names, row_count) for adapter in renamed]
    assert [list(adapter.modules) for adapter in fused] == [["diffusion_model.block.qkv"]] * 2
    torch.testing.assert_close(fused[0].modules["diffusion_model.block.qkv"].delta(), whole.delta())
    expected = torch.cat([first.delta(), torch.zeros(5, 5)])
    torch.testing.assert_close(fused[1].modules["diffusion_model.block.qkv"].delta(), expected)
