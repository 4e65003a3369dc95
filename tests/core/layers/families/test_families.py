"""The tables of names: every name leads back to the weight and rows it was made for."""

from __future__ import annotations

import pytest
from legomole.core.layers.families import FAMILIES
from legomole.core.layers.families.table import WHOLE, Family, Part, canonical_templates

EVERY = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)


@EVERY
def test_every_name_leads_back_to_its_rows(family: Family) -> None:
    for component in family.components:
        for template in canonical_templates(component):
            path = template.replace("#", "3")
            for dialect in component.dialects:
                for slot in component.slots(dialect.naming, path):
                    assert family.find(dialect.spell(slot.path)) == (component, path, slot.part), dialect


@EVERY
def test_no_dialect_gives_two_weights_one_name(family: Family) -> None:
    for component in family.components:
        for dialect in component.dialects:
            names = [
                dialect.spell(slot.path)
                for template in canonical_templates(component)
                for slot in component.slots(dialect.naming, template.replace("#", "3"))
            ]
            assert len(names) == len(set(names)), dialect


@EVERY
def test_parts_of_a_weight_do_not_overlap(family: Family) -> None:
    for component in family.components:
        for naming in component.namings:
            for template in canonical_templates(component):
                parts = [slot.part for slot in component.slots(naming, template.replace("#", "3"))]
                assert len({part.shares for part in parts}) <= 1
                assert len({part.index for part in parts}) == len(parts)


@EVERY
def test_comfyui_reads_the_first_name_of_every_weight(family: Family) -> None:
    """So that there always is a name for it."""
    for component in family.components:
        readable = [dialect for dialect in component.dialects if "comfy" in dialect.readers]
        for template in canonical_templates(component):
            path = template.replace("#", "3")
            slots = [slot for dialect in readable for slot in component.slots(dialect.naming, path)]
            assert any(slot.part == WHOLE and slot.comfy for slot in slots)


def family(name: str) -> Family:
    return next(family for family in FAMILIES if family.name == name)


@pytest.mark.parametrize(
    ("name", "module", "path", "part"),
    [
        ("z_image", "lora_unet_layers_7_attention_to_k", "layers.7.attention.qkv", Part((1, 1, 1), 1)),
        ("z_image", "diffusion_model.layers.7.attention.to_out.0", "layers.7.attention.out", WHOLE),
        ("lumina2", "transformer.layers.1.attn.to_v", "layers.1.attention.qkv", Part((3, 1, 1), 2)),
        (
            "flux",
            "transformer.single_transformer_blocks.37.proj_mlp",
            "single_blocks.37.linear1",
            Part((1, 1, 1, 4), 3),
        ),
        ("flux", "transformer.norm_out.linear", "final_layer.adaLN_modulation.1", Part(swapped=True)),
        ("flux", "lora_unet_transformer_blocks_10_attn_to_k_", "double_blocks.10.img_attn.qkv", Part((1, 1, 1), 1)),
        ("flux2", "transformer.single_transformer_blocks.2.attn.to_out", "single_blocks.2.linear2", WHOLE),
        ("hunyuan_video", "lora_unet_double_blocks_0_img_mlp_fc2", "double_blocks.0.img_mlp.2", WHOLE),
        ("hunyuan_video", "transformer.double_blocks.0.img_attn_qkv", "double_blocks.0.img_attn.qkv", WHOLE),
        ("wan", "lora_unet__blocks_3_self_attn_q", "blocks.3.self_attn.q", WHOLE),
        ("wan", "transformer.vace_blocks.1.proj_in", "vace_blocks.1.before_proj", WHOLE),
        ("sdxl", "lycoris_down_blocks_1_attentions_0_proj_in", "input_blocks.4.1.proj_in", WHOLE),
        ("sdxl", "unet.up_blocks.0.upsamplers.0.conv", "output_blocks.2.2.conv", WHOLE),
        ("sd1", "unet.up_blocks.0.upsamplers.0.conv", "output_blocks.2.1.conv", WHOLE),
        ("anima", "lora_te_layers_2_mlp_down_proj", "model.layers.2.mlp.down_proj", WHOLE),
    ],
)
def test_names_seen_in_files(name: str, module: str, path: str, part: Part) -> None:
    hit = family(name).find(module)
    assert hit is not None
    assert hit[1:] == (path, part)


def test_unknown_names_are_unknown() -> None:
    for name in ("model.layers.0.self_attn.q_proj", "lora_unet_a", "text_encoder.x", "diffusion_model.blocks.0"):
        assert all(family.find(name) is None for family in FAMILIES)
    assert family("sdxl").find("lora_unet_input_blocks_10_1_proj_in") is None  # SD 1.x has that block
