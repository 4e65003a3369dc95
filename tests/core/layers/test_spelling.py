"""unify_spelling(): one layer under names that differ in prefix and punctuation only."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.layers.align import align
from legomole.core.layers.spelling import unify_spelling
from legomole.core.lowrank import LowRank


def lora(*names: str, diffs: tuple[str, ...] = ()) -> Adapter:
    modules = {name: LowRank(torch.randn(2, 3), torch.randn(6, 2)) for name in names}
    return Adapter(modules, {name: torch.ones(6) for name in diffs})


PAIRS = {
    "Wan, musubi": ("diffusion_model.blocks.0.self_attn.q", "lora_unet_blocks_0_self_attn_q"),
    "Wan-Fun": ("diffusion_model.blocks.0.self_attn.q", "lora_unet__blocks_0_self_attn_q"),
    "Qwen, raw PEFT": ("diffusion_model.transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_q"),
    "Qwen, kohya": ("diffusion_model.transformer_blocks.0.attn.to_q", "lora_unet_transformer_blocks_0_attn_to_q"),
    "LTX": ("diffusion_model.transformer_blocks.0.attn1.to_q", "transformer.transformer_blocks.0.attn1.to_q"),
    "Flux, OneTrainer": (
        "transformer.transformer_blocks.0.attn.to_q",
        "lora_transformer_transformer_blocks_0_attn_to_q",
    ),
    "Flux, trailing _": ("transformer.transformer_blocks.0.attn.to_k", "lora_unet_transformer_blocks_0_attn_to_k_"),
    "Hunyuan": ("diffusion_model.double_blocks.0.img_attn.qkv", "transformer.double_blocks.0.img_attn_qkv"),
}


@pytest.mark.parametrize("case", PAIRS)
@pytest.mark.parametrize("swap", [False, True])
def test_pairs_get_the_name_that_more_programs_read(case: str, swap: bool) -> None:
    good, other = PAIRS[case]
    names = (other, good) if swap else (good, other)
    adapters = [lora(name) for name in names]
    found = align(adapters)
    assert [list(adapter.modules) for adapter in found] == [[good], [good]]
    assert all(torch.equal(a.modules[good].A, b.modules[n].A) for a, b, n in zip(found, adapters, names, strict=True))


def test_bare_paths_beside_underscored_ones_get_the_usual_prefix() -> None:
    found = align([lora("double_blocks.0.img_attn.qkv"), lora("lora_unet_double_blocks_0_img_attn_qkv")])
    assert all(list(adapter.modules) == ["diffusion_model.double_blocks.0.img_attn.qkv"] for adapter in found)


def test_other_blocks_are_spelled_like_the_same_layer_of_another_block() -> None:
    dotted = lora("diffusion_model.blocks.0.ffn.0", diffs=("diffusion_model.blocks.0.norm_q.weight",))
    flat = lora("lora_unet_blocks_0_ffn_0", "lora_unet_blocks_12_ffn_2", "lora_unet_blocks_12_ffn_0", "lora_unet_head")
    found = unify_spelling([dotted, flat])
    assert found[0].diffs.keys() == dotted.diffs.keys()
    assert list(found[1].modules) == [
        "diffusion_model.blocks.0.ffn.0",
        "diffusion_model.blocks.12.ffn.2",
        "diffusion_model.blocks.12.ffn.0",
        "lora_unet_head",
    ]


def test_two_names_of_a_layer_in_one_file_are_not_changed() -> None:
    both = lora("diffusion_model.a.q", "lora_unet_a_q")
    assert unify_spelling([both, lora("diffusion_model.a.q")])[0] is both


def test_other_differences_are_for_a_host() -> None:
    with pytest.raises(MergeError, match="no layer in common"):
        align([lora("unet.some_blocks.0.attn1.to_q"), lora("lora_unet_some_blocks_0_attn1_to_k")])
