"""Small LoRAs in the dialects found in the wild: real key names, real layer shapes (splits fall where they do)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

Shapes = Mapping[str, tuple[int, ...]]  # layer -> (d_out, d_in) or (d_out, channels, kernel, kernel)

# The same layers in the same order in each pair.
KOHYA_SD15: Shapes = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (320, 320),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0": (320, 320),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (320, 768),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_0_proj": (2560, 320),
    "lora_unet_down_blocks_0_attentions_0_proj_in": (320, 320, 1, 1),
    "lora_unet_down_blocks_0_resnets_0_conv1": (320, 320, 3, 3),
    "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_v": (1280, 1280),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (768, 768),
    "lora_te_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
DIFFUSERS_SD15: Shapes = {
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (320, 320),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0": (320, 320),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (320, 768),
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj": (2560, 320),
    "unet.down_blocks.0.attentions.0.proj_in": (320, 320, 1, 1),
    "unet.down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
    "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_v": (1280, 1280),
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj": (768, 768),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768),
}
KOHYA_SDXL: Shapes = {
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q": (640, 640),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k": (640, 2048),
    "lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj": (5120, 640),
    "lora_unet_input_blocks_1_0_in_layers_2": (320, 320, 3, 3),
    "lora_unet_input_blocks_3_0_op": (320, 320, 3, 3),
    "lora_unet_middle_block_1_proj_in": (1280, 1280),
    "lora_unet_output_blocks_5_1_transformer_blocks_1_ff_net_2": (640, 2560),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
    "lora_te2_text_model_encoder_layers_0_self_attn_q_proj": (1280, 1280),
}
DIFFUSERS_SDXL: Shapes = {
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (640, 640),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k": (640, 2048),
    "unet.down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj": (5120, 640),
    "unet.down_blocks.0.resnets.0.conv1": (320, 320, 3, 3),
    "unet.down_blocks.0.downsamplers.0.conv": (320, 320, 3, 3),
    "unet.mid_block.attentions.0.proj_in": (1280, 1280),
    "unet.up_blocks.1.attentions.2.transformer_blocks.1.ff.net.2": (640, 2560),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768),
    "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj": (1280, 1280),
}
KOHYA_FLUX: Shapes = {
    "lora_unet_double_blocks_0_img_attn_qkv": (9216, 3072),
    "lora_unet_double_blocks_0_img_mlp_0": (12288, 3072),
    "lora_unet_single_blocks_3_linear1": (21504, 3072),
    "lora_unet_single_blocks_3_linear2": (3072, 15360),
    "lora_unet_final_layer_adaLN_modulation_1": (6144, 3072),
    "lora_unet_img_in": (3072, 64),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
AI_TOOLKIT_FLUX: Shapes = {
    **{f"transformer.transformer_blocks.0.attn.to_{x}": (3072, 3072) for x in "qkv"},
    "transformer.transformer_blocks.0.ff.net.0.proj": (12288, 3072),
    **{f"transformer.single_transformer_blocks.3.attn.to_{x}": (3072, 3072) for x in "qkv"},
    "transformer.single_transformer_blocks.3.proj_mlp": (12288, 3072),
    "transformer.single_transformer_blocks.3.proj_out": (3072, 15360),
    "transformer.norm_out.linear": (6144, 3072),
    "transformer.x_embedder": (3072, 64),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768),
}
KOHYA_SD3: Shapes = {
    "lora_unet_joint_blocks_0_x_block_attn_qkv": (4608, 1536),
    "lora_unet_joint_blocks_0_context_block_mlp_fc1": (6144, 1536),
    "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1": (3072, 1536),
    "lora_te1_text_model_encoder_layers_0_mlp_fc1": (3072, 768),
}
DIFFUSERS_SD3: Shapes = {
    **{f"transformer.transformer_blocks.0.attn.to_{x}": (1536, 1536) for x in "qkv"},
    "transformer.transformer_blocks.0.ff_context.net.0.proj": (6144, 1536),
    "transformer.transformer_blocks.23.norm1_context.linear": (3072, 1536),
    "text_encoder.text_model.encoder.layers.0.mlp.fc1": (3072, 768),
}
# Dialects without a pair here: layer -> shape, for the key map.
XLABS_FLUX: Shapes = {
    "double_blocks.0.processor.qkv_lora1": (9216, 3072),
    "double_blocks.0.processor.proj_lora2": (3072, 3072),
    "single_blocks.0.processor.qkv_lora": (9216, 3072),
}
ONETRAINER_FLUX: Shapes = {
    "lora_transformer_transformer_blocks_0_attn_to_q": (3072, 3072),
    "lora_transformer_single_transformer_blocks_0_proj_out": (3072, 15360),
}
WAN: Shapes = {"diffusion_model.blocks.0.self_attn.q": (512, 512), "diffusion_model.blocks.7.ffn.0": (1024, 512)}
WAN_MUSUBI: Shapes = {"lora_unet_blocks_0_self_attn_q": (512, 512), "lora_unet_blocks_7_ffn_0": (1024, 512)}
Z_IMAGE: Shapes = {f"diffusion_model.layers.0.attention.to_{x}": (384, 384) for x in "qkv"}
Z_IMAGE_KOHYA: Shapes = {"lora_unet_layers_0_attention_qkv": (1152, 384)}
HUNYUAN: Shapes = {
    "transformer.double_blocks.0.img_attn_qkv": (9216, 3072),
    "transformer.double_blocks.0.img_mlp.fc1": (12288, 3072),
}
FLUX2: Shapes = {
    "lora_unet_double_blocks_0_img_mlp_0": (18432, 3072),
    "lora_unet_single_blocks_0_linear1": (27648, 3072),
}
LLAMA: Shapes = {
    "model.layers.0.self_attn.q_proj": (64, 64),
    "model.layers.1.mlp.gate_proj": (96, 64),
    "model.layers.11.mlp.gate_proj": (96, 64),
}

KOHYA = ("lora_down.weight", "lora_up.weight")
PEFT = ("lora_A.weight", "lora_B.weight")


def state_dict(
    shapes: Shapes,
    suffixes: tuple[str, str] = KOHYA,
    *,
    rank: int = 4,
    alpha: float | None = 2.0,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    prefix: str = "",
) -> dict[str, Tensor]:
    """Random factors of every layer; convolutions keep their kernel in ``down`` and a 1x1 in ``up``."""
    generator = torch.Generator().manual_seed(seed)
    state: dict[str, Tensor] = {}
    for name, (d_out, *rest) in shapes.items():
        ones = [1] * (len(rest) - 1)
        state[f"{prefix}{name}.{suffixes[0]}"] = torch.randn(rank, *rest, generator=generator).to(dtype)
        state[f"{prefix}{name}.{suffixes[1]}"] = torch.randn(d_out, rank, *ones, generator=generator).to(dtype)
        if alpha is not None:
            state[f"{prefix}{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
    return state


def write(
    path: Path, state: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None, without: Sequence[str] = ()
) -> Path:
    """Write a safetensors file with the library's own writer."""
    save_file(
        {key: value.contiguous() for key, value in state.items() if key not in without}, path, dict(metadata or {})
    )
    return path
