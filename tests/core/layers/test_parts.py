"""Patterns of layers: names of parts, ranges of blocks, lists and negation, over names of several dialects."""

from __future__ import annotations

import pytest
from legomole.core.layers.parts import PARTS, layers_matching, unknown_terms

from ...lora_files import DIFFUSERS_SD15, DIFFUSERS_SDXL, KOHYA_FLUX, KOHYA_SD15, KOHYA_SDXL


@pytest.mark.parametrize(("kohya", "diffusers"), [(KOHYA_SD15, DIFFUSERS_SD15), (KOHYA_SDXL, DIFFUSERS_SDXL)])
@pytest.mark.parametrize("part", PARTS)
def test_parts_are_the_same_layers_in_both_dialects(part: str, kohya: dict, diffusers: dict):
    """The lists name the same layers in the same order; thirds of blocks depend on which blocks there are."""
    if part.endswith("-blocks"):
        return
    positions = [
        [list(names).index(name) for name in layers_matching(part, list(names))] for names in (kohya, diffusers)
    ]
    assert positions[0] == positions[1]


def test_parts_of_sd15():
    names = list(DIFFUSERS_SD15)
    assert layers_matching("attention", names) == [names[i] for i in (0, 1, 2, 6, 7)]
    assert layers_matching("cross-attention", names) == [names[2]]
    assert layers_matching("feed-forward", names) == [names[3], names[8]]
    assert layers_matching("text-encoder", names) == names[7:]
    assert layers_matching("convolution", names) == [names[5]]
    assert layers_matching("unet-mid", names) == [names[6]]
    assert layers_matching("unet-up", names) == []


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lora_unet_double_blocks_0_img_attn_qkv", {"attention", "double-blocks"}),
        ("lora_unet_double_blocks_0_img_mlp_0", {"feed-forward", "double-blocks"}),
        ("lora_unet_single_blocks_3_linear1", {"single-blocks"}),
        ("transformer.transformer_blocks.4.ff_context.net.0.proj", {"feed-forward", "double-blocks"}),
        ("transformer.single_transformer_blocks.4.attn.to_q", {"attention", "single-blocks"}),
        ("diffusion_model.blocks.7.cross_attn.k", {"attention", "cross-attention"}),
        ("model.layers.3.self_attn.q_proj", {"attention"}),
        ("model.layers.3.mlp.gate_proj", {"feed-forward"}),
        ("diffusion_model.layers.0.attention.to_q", {"attention"}),
        ("diffusion_model.layers.0.feed_forward.w1", {"feed-forward"}),
    ],
)
def test_parts_of_transformers(name: str, parts: set[str]):
    regions = {"first-blocks", "middle-blocks", "last-blocks"}
    assert {part for part in PARTS if layers_matching(part, [name])} - regions == parts


def test_ranges_of_blocks():
    dotted = [f"transformer.transformer_blocks.{i}.attn.to_q" for i in range(12)]
    dotted += [f"transformer.single_transformer_blocks.{i}.attn.to_q" for i in range(12)]
    assert layers_matching("single_transformer_blocks.1-2", dotted) == dotted[13:15]
    assert layers_matching("blocks.10-99", [*KOHYA_FLUX]) == []
    assert layers_matching("blocks.0-0", [*KOHYA_FLUX]) == [name for name in KOHYA_FLUX if "_blocks_0_" in name]
    assert layers_matching("layers.1-1", ["a.layers.1.q", "a.layers.11.q", "a_layers_1_q"]) == [
        *("a.layers.1.q", "a_layers_1_q")
    ]


def test_thirds_of_the_blocks():
    names = [f"blocks.{i}.{x}" for i in range(6) for x in ("q", "k")]
    assert layers_matching("first-blocks", names) == names[:4]
    assert layers_matching("middle-blocks", names) == names[4:8]
    assert layers_matching("last-blocks", names) == names[8:]


def test_lists_and_negation():
    names = ["a.attn.q", "a.mlp.w", "b.x"]
    assert layers_matching("attention,*.x", names) == ["a.attn.q", "b.x"]
    assert layers_matching("!attention, feed-forward", names) == ["b.x"]
    assert layers_matching("[!b]*", names) == names[:2]
    assert layers_matching("!*", names) == []


def test_unknown_terms_are_typing_errors():
    assert unknown_terms("!atention,cross-attention,a.*", ["a.attn.q"]) == ["atention"]
