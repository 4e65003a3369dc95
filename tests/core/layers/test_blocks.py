"""Blocks by layer names of real files."""

from __future__ import annotations

import pytest
from legomole.core.layers.blocks import ALL, FIRST, LAST, MIDDLE, REST, TEXT, ModelBlock, blocks_of, short_names

from ... import lora_files as files


def sections(layers) -> dict[str, str]:
    return {block.name: block.section for block in blocks_of(layers)}


def test_dotted_and_underscored_names_have_the_same_blocks():
    below = "attentions.0.transformer_blocks.0"
    dotted = [
        f"unet.down_blocks.{i}.{below}.{layer}"
        for i in range(2)
        for layer in ("attn1.to_q", "attn1.to_out.0", "attn2.to_k", "ff.net.0.proj", "ff.net.2")
    ]
    flat = [f"lora_unet_{name.removeprefix('unet.').replace('.', '_')}" for name in dotted]
    assert [block.name for block in blocks_of(dotted)] == [f"unet.down_blocks.{i}.{below}" for i in range(2)]
    assert [block.name for block in blocks_of(flat)] == [
        f"lora_unet_down_blocks_{i}_{below.replace('.', '_')}" for i in range(2)
    ]
    assert [len(block.layers) for block in blocks_of(flat)] == [5, 5]


def test_layers_around_a_nested_block_are_a_block_too():
    layers = ["down.0.attentions.0.proj_in", *(f"down.0.attentions.0.blocks.0.{x}.q" for x in ("attn1", "attn2"))]
    assert {block.name: len(block.layers) for block in blocks_of(layers)} == {
        "down.0.attentions.0": 1,
        "down.0.attentions.0.blocks.0": 2,
    }


def test_flux_runs_from_double_to_single_blocks():
    layers = [
        *(f"transformer.single_transformer_blocks.{i}.{x}" for i in (0, 10, 2) for x in ("attn.to_q", "proj_out")),
        *(f"transformer.transformer_blocks.{i}.{x}" for i in range(3) for x in ("attn.to_q", "ff.net.0.proj")),
        "transformer.x_embedder",
        "text_encoder.text_model.encoder.layers.0.mlp.fc1",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
    ]
    double, single = ("transformer.transformer_blocks", "transformer.single_transformer_blocks")
    assert list(sections(layers).items()) == [
        (f"{double}.0", FIRST),
        (f"{double}.1", FIRST),
        (f"{double}.2", MIDDLE),
        (f"{single}.0", MIDDLE),
        (f"{single}.2", LAST),
        (f"{single}.10", LAST),
        ("outside of blocks", REST),
        ("text_encoder.text_model.encoder.layers", TEXT),
    ]


def test_layers_of_one_kind_belong_to_the_outermost_number():
    assert sections(["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]) == {
        "model.layers.0": ALL,
        "model.layers.1": ALL,
    }
    assert sections(["x", "y"]) == {"outside of blocks": REST}
    assert blocks_of([]) == []


def test_too_many_blocks_are_grouped_by_the_outermost():
    layers = [f"up.{i}.blocks.{j}.{x}.q" for i in range(7) for j in range(7) for x in ("a", "b")]
    assert [block.name for block in blocks_of(layers)] == [f"up.{i}" for i in range(7)]
    assert len(blocks_of(layers[:-14])) == 42


@pytest.mark.parametrize("shapes", [files.KOHYA_SD15, files.DIFFUSERS_SDXL, files.KOHYA_FLUX, files.KOHYA_SD3])
def test_every_layer_is_in_one_block(shapes):
    found = [name for block in blocks_of(shapes) for name in block.layers]
    assert sorted(found) == sorted(shapes)


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("lora_unet_down_blocks_0_attentions_1_transformer_blocks_0", "down 0 attentions 1 transformer 0"),
        ("unet.mid_block.attentions.0", "mid_block.attentions 0"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0", "input 4 1 transformer 0"),
        ("transformer.transformer_blocks.3", "transformer 3"),
        ("diffusion_model.single_blocks.12", "single 12"),
        ("base_model.model.model.layers.7", "layers 7"),
        ("blocks.7", "blocks 7"),
        ("lora_te1_text_model_encoder_layers", "lora_te1"),
        ("text_encoder_2.text_model.encoder.layers", "text_encoder_2"),
        ("outside of blocks", "outside of blocks"),
    ],
)
def test_short_names(name, short):
    assert short_names([ModelBlock(name, ALL, ())]) == [short]


def test_equal_short_names_stay_long():
    names = ["unet.blocks.0", "model.blocks.0"]
    assert short_names([ModelBlock(name, ALL, ()) for name in names]) == names
