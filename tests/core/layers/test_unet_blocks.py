"""Blocks of U-Nets: Stability's and diffusers' names of the same layers, and the presets by hand."""

from __future__ import annotations

import pytest
from legomole.core.layers.parts import layers_matching
from legomole.core.layers.unet_blocks import BLOCKS, PRESETS, unet_block

PAIRS = [  # the same layers of Stable Diffusion 1.5 in both layouts
    ("input_blocks.1.1.transformer_blocks.0.attn1.to_q", "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"),
    ("input_blocks.2.0.in_layers.2", "down_blocks.0.resnets.1.conv1"),
    ("input_blocks.3.0.op", "down_blocks.0.downsamplers.0.conv"),
    ("input_blocks.4.1.proj_in", "down_blocks.1.attentions.0.proj_in"),
    ("input_blocks.8.1.proj_in", "down_blocks.2.attentions.1.proj_in"),
    ("input_blocks.11.0.in_layers.2", "down_blocks.3.resnets.1.conv1"),
    ("middle_block.1.proj_in", "mid_block.attentions.0.proj_in"),
    ("output_blocks.2.1.conv", "up_blocks.0.upsamplers.0.conv"),
    ("output_blocks.3.1.proj_in", "up_blocks.1.attentions.0.proj_in"),
    ("output_blocks.11.1.proj_in", "up_blocks.3.attentions.2.proj_in"),
]


@pytest.mark.parametrize(("stability", "diffusers"), PAIRS)
def test_both_layouts_and_spellings_name_one_block(stability: str, diffusers: str):
    block = unet_block(f"diffusion_model.{stability}.weight")
    assert block in BLOCKS
    assert unet_block(f"unet.{diffusers}.weight") == block
    assert unet_block(f"lora_unet_{diffusers.replace('.', '_')}_weight") == block


def test_the_conversion_of_diffusers_agrees():
    """Every layer that it renames has the same block under both names."""
    utils = pytest.importorskip("diffusers.loaders.lora_conversion_utils")
    names = [f"input_blocks_{i}_1_proj_in" for i in (1, 2, 4, 5, 7, 8)]
    names += [f"output_blocks_{i}_1_proj_in" for i in range(3, 12)]
    config = type("Config", (), {"layers_per_block": 2})
    for name in names:
        key = f"lora_unet_{name}.alpha"
        (mapped,) = utils._maybe_map_sgm_blocks_to_diffusers({key: 0}, config)
        mapped = mapped.replace("input_blocks", "down_blocks").replace("output_blocks", "up_blocks")
        assert unet_block(mapped) == unet_block(key) is not None


def test_presets_by_hand():
    stems = {
        **{"IN01": "input_blocks_1_1", "IN04": "input_blocks_4_1", "IN05": "input_blocks_5_1"},
        **{"MID": "middle_block_1", "OUT03": "output_blocks_3_1", "OUT07": "output_blocks_7_1"},
    }
    names = {block: f"lora_unet_{stem}_attn1_to_q" for block, stem in stems.items()}
    names |= {"BASE": "lora_te_text_model_encoder_layers_0_mlp_fc1", "": "lora_unet_double_blocks_0_img_attn_qkv"}
    blocks = {name: block for block, name in names.items()}

    def kept(pattern: str) -> list[str]:
        return [blocks[name] for name in layers_matching(pattern, list(names.values()))]

    assert kept("INS") == ["IN01", "IN04", "BASE"]
    assert kept("MIDD") == ["IN05", "MID", "OUT03"]
    assert kept("OUTALL") == ["OUT03", "OUT07"]
    assert kept("IN05,OUT07") == ["IN05", "OUT07"]
    assert kept("!BASE,MID") == ["IN01", "IN04", "IN05", "OUT03", "OUT07", ""]
    assert {len(preset) for preset in PRESETS.values()} == {3, 4, 5, 7, 8, 9}


def test_other_models_have_no_such_blocks():
    for name in ("diffusion_model.double_blocks.3.img_attn.qkv", "unet.conv_in", "blocks.0.attn.q"):
        assert unet_block(name) is None
