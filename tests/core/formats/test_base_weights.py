"""Weights of a base model by the names of LoRA files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from legomole.core.errors import FormatError
from legomole.core.formats.base_weights import BaseWeights
from safetensors.torch import save_file

WEIGHT = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    ("key", "module"),
    [
        ("model.diffusion_model.middle_block.1.proj_in.weight", "lora_unet_middle_block_1_proj_in"),
        ("double_blocks.0.img_attn.qkv.weight", "diffusion_model.double_blocks.0.img_attn.qkv"),
        ("diffusion_model.double_blocks.0.img_attn.qkv.weight", "lora_unet_double_blocks_0_img_attn_qkv"),
        ("cond_stage_model.transformer.text_model.encoder.mlp.fc1.weight", "lora_te_text_model_encoder_mlp_fc1"),
        ("conditioner.embedders.0.transformer.text_model.mlp.fc1.weight", "lora_te1_text_model_mlp_fc1"),
        ("model.layers.0.self_attn.q_proj.weight", "model.layers.0.self_attn.q_proj"),
    ],
)
def test_a_checkpoint(key: str, module: str, tmp_path: Path) -> None:
    save_file({key: WEIGHT.half(), "other.weight": torch.ones(2)}, tmp_path / "base.safetensors")
    assert torch.equal(BaseWeights(tmp_path / "base.safetensors").weight(module, 3, 4), WEIGHT.double())


def test_the_components_of_a_pipeline(tmp_path: Path) -> None:
    for number, component in enumerate(("unet", "text_encoder", "text_encoder_2")):
        (tmp_path / component).mkdir()
        save_file({"blocks.0.fc.weight": WEIGHT + number}, tmp_path / component / "model.safetensors")
    save_file({"blocks.0.fc.weight": WEIGHT.half()}, tmp_path / "unet/model.fp16.safetensors")
    base = BaseWeights(tmp_path)
    dotted = [f"{component}.blocks.0.fc" for component in ("unet", "text_encoder", "text_encoder_2")]
    for name, found in zip([*dotted, "lora_te1_blocks_0_fc", "lora_te2_blocks_0_fc"], (0, 1, 2, 1, 2), strict=True):
        assert float(base.weight(name, 3, 4)[0, 0]) == found


def test_convolutions_are_flattened(tmp_path: Path) -> None:
    weight = torch.randn(2, 3, 5, 5)
    save_file({"x.conv.weight": weight}, tmp_path / "base.safetensors")
    assert torch.equal(BaseWeights(tmp_path / "base.safetensors").weight("x.conv", 2, 75), weight.flatten(1).double())


def test_what_is_missing_or_unusable_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="no such file"):
        BaseWeights(tmp_path / "none.safetensors").weight("x", 3, 4)
    with pytest.raises(FormatError, match="holds no weights"):
        BaseWeights(tmp_path).weight("x", 3, 4)
    path = tmp_path / "base.safetensors"
    twice = {"model.diffusion_model.y.weight": WEIGHT, "y.weight": WEIGHT.clone()}
    save_file({"x.weight": WEIGHT.to(torch.float8_e4m3fn), **twice}, path)
    base = BaseWeights(path)
    with pytest.raises(FormatError, match=r"no weight for a layer[\s\S]*names such as"):
        base.weight("z", 3, 4)
    with pytest.raises(FormatError, match=r"no weight for a layer[\s\S]*x.weight \(3, 4\)"):
        base.weight("x", 4, 4)
    with pytest.raises(FormatError, match="several weights"):
        base.weight("y", 3, 4)
    with pytest.raises(FormatError, match="quantised"):
        base.weight("x", 3, 4)
