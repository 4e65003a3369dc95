"""align(): which adapters can be merged, and under which names."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import MergeError
from legomole.core.layers.align import align
from legomole.core.layers.keymap import KeyMap, MappedRows
from legomole.core.lowrank import LowRank


def lora(*names: str, d_out: int = 6, d_in: int = 3, file: str = "f", **metadata: str) -> Adapter:
    modules = {name: LowRank(torch.ones(2, d_in), torch.ones(d_out, 2)) for name in names}
    return Adapter(modules, metadata=metadata, source=Source(file, format="kohya"))


def never(adapters: Sequence[Adapter]) -> KeyMap:
    raise AssertionError("the key map is not needed")


def names(adapters: Sequence[Adapter]) -> list[set[str]]:
    return [set(adapter.modules) for adapter in adapters]


def test_adapters_of_one_dialect_are_returned_unchanged() -> None:
    adapters = [lora("lora_unet_a", "lora_unet_b"), lora("lora_unet_a")]
    assert align(adapters, key_map=never) == adapters
    assert align(adapters[:1], key_map=never) == adapters[:1]
    assert align([], key_map=never) == []


def test_adapters_connected_by_a_third() -> None:
    adapters = [lora("lora_unet_a"), lora("lora_unet_b"), lora("lora_unet_a", "lora_unet_b")]
    assert align(adapters) == adapters


def test_linear_and_convolution_factors_are_compatible() -> None:
    conv = Adapter({"lora_unet_a": LowRank(torch.ones(2, 3), torch.ones(6, 2), kernel=(1, 1))})
    assert len(align([lora("lora_unet_a"), conv])) == 2


def test_text_encoder_alone_and_model_alone() -> None:
    adapters = [lora("lora_unet_a"), lora("lora_te_x")]
    assert align(adapters) == adapters
    with pytest.raises(MergeError, match="no layer in common"):
        align([lora("unet.a"), lora("lora_te_x")])


DIALECTS: KeyMap = {
    "lora_unet_qkv": (
        MappedRows("unet.q", ((0, 2),)),
        MappedRows("unet.k", ((2, 4),)),
        MappedRows("unet.v", ((4, 6),)),
    ),
    "lora_unet_ff": (MappedRows("unet.ff"),),
    "lora_te_x": (MappedRows("text_encoder.x"),),
    **{f"unet.{name}": (MappedRows(f"unet.{name}"),) for name in ("q", "k", "v", "ff", "p")},
    "lora_unet_q": (MappedRows("unet.q"),),
}


def test_different_dialects_are_renamed() -> None:
    found = align([lora("lora_unet_qkv", "lora_unet_ff"), lora("unet.q", d_out=2)], key_map=lambda _: DIALECTS)
    assert names(found) == [{"unet.q", "unet.k", "unet.v", "unet.ff"}, {"unet.q"}]


def test_without_a_key_map_the_error_says_what_helps() -> None:
    with pytest.raises(MergeError, match=r"one and two[\s\S]*lora_unet_ff[\s\S]*unet.q[\s\S]*install diffusers"):
        align([lora("lora_unet_ff", file="one"), lora("unet.q", file="two")])


def test_fused_against_split_with_other_layers_in_common() -> None:
    """They share ff under their own names already, but only the key map maps qkv to q."""
    fused = lora("lora_unet_ff", "lora_unet_qkv")
    split = Adapter({**lora("lora_unet_ff").modules, **lora("lora_unet_q", d_out=2).modules})
    found = align([fused, split], key_map=lambda _: DIALECTS)
    assert names(found) == [{"unet.ff", "unet.q", "unet.k", "unet.v"}, {"unet.ff", "unet.q"}]


def test_own_names_are_kept_if_no_more_layers_are_shared_under_a_key_map() -> None:
    adapters = [lora("lora_unet_ff", "lora_unet_qkv"), lora("lora_unet_ff", "lora_unet_p")]
    renamed = {name: (MappedRows(f"unet.{name}"),) for adapter in adapters for name in adapter.modules}
    assert align(adapters, key_map=lambda _: renamed) == adapters


def test_a_failing_key_map_does_not_matter_where_none_is_needed() -> None:
    def fail(adapters: Sequence[Adapter]) -> KeyMap:
        raise MergeError("diffusers is missing")

    adapters = [lora("lora_unet_ff", "lora_unet_qkv"), lora("lora_unet_ff", "lora_unet_p")]
    assert align(adapters, key_map=fail) == adapters
    with pytest.raises(MergeError, match="diffusers is missing"):
        align([lora("lora_unet_ff"), lora("unet.q")], key_map=fail)


def test_disjoint_layers_of_one_model_may_be_merged() -> None:
    found = align([lora("lora_unet_ff"), lora("unet.q")], key_map=lambda _: DIALECTS)
    assert names(found) == [{"unet.ff"}, {"unet.q"}]


def test_disjoint_networks_may_not() -> None:
    known = {**DIALECTS, "t": (MappedRows("transformer.t"),)}
    with pytest.raises(MergeError, match="no layer in common"):
        align([lora("lora_unet_ff"), lora("t")], key_map=lambda _: known)


def test_different_base_models() -> None:
    one = lora("lora_unet_a", file="one", ss_base_model_version="sd_v1")
    two = lora("lora_unet_a", file="two", d_in=4, **{"modelspec.architecture": "sdxl"})
    with pytest.raises(
        MergeError,
        match=r"different base[\s\S]*one and two[\s\S]*lora_unet_a[\s\S]*\(6, 3\) \(sd_v1\) and \(6, 4\) \(sdxl\)",
    ):
        align([one, two])
