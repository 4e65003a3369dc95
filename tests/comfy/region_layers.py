"""Run by ComfyUI's own Python: where maps act in the transformers of ComfyUI's own code.

Usage: region_layers.py <ComfyUI> <base directory>. Prints one JSON object: "layers" for where maps act, "attention" for
what automatic regions read: case -> "" or the error.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

COMFY, BASE = (Path(argument) for argument in sys.argv[1:3])
sys.argv = [sys.argv[0], "--cpu", "--use-pytorch-cross-attention"]
sys.path[0:0] = [str(COMFY), str(BASE / "custom_nodes"), str(Path(__file__).parents[1] / "core/mole/regions")]

import comfy.options  # noqa: E402

comfy.options.enable_args_parsing()
import torch  # noqa: E402
from arrivals import Case, check, check_attention, noise  # noqa: E402
from comfy.ldm.aura.mmdit import MMDiT  # noqa: E402
from comfy.ldm.chroma.model import Chroma  # noqa: E402
from comfy.ldm.cogvideo.model import CogVideoXTransformer3DModel  # noqa: E402
from comfy.ldm.flux.model import Flux  # noqa: E402
from comfy.ldm.hunyuan_video.model import HunyuanVideo  # noqa: E402
from comfy.ldm.lumina.model import NextDiT  # noqa: E402
from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper  # noqa: E402
from comfy.ldm.omnigen.omnigen2 import OmniGen2Transformer2DModel  # noqa: E402
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel  # noqa: E402
from comfy.ldm.wan.model import WanModel  # noqa: E402
from comfy.ops import disable_weight_init  # noqa: E402
from torch import Tensor, nn  # noqa: E402

SIZE = (8, 12)


def built(model: Callable[..., nn.Module], **options: Any) -> nn.Module:
    """The model with seeded random weights: ComfyUI leaves them uninitialised."""
    module = model(dtype=torch.float32, device="cpu", operations=disable_weight_init, **options)
    g = torch.Generator().manual_seed(0)
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = 0.2 * torch.randn(tensor.shape, generator=g)
    return module.requires_grad_(False)


def picture(change: Tensor, channels: int, frames: int = 0, batch: int = 2) -> Tensor:
    return noise(batch, channels, *([frames] if frames else []), *SIZE) + change


def flux(layer: str, double: int = 0, *, reference: bool = False) -> Case:
    model = built(
        Flux, in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=16, mlp_ratio=2.0,
        num_heads=2, depth=double, depth_single_blocks=1, axes_dim=[2, 2, 4], theta=10000, patch_size=2,
        qkv_bias=True, guidance_embed=False, txt_ids_dims=[],
    )  # fmt: skip
    more = {"ref_latents": [noise(2, 4, 4, 4)]} if reference else {}
    return Case(model, layer, SIZE, lambda d: model(picture(d, 4), torch.ones(2), noise(2, 7, 16), noise(2, 8), **more))


def chroma() -> Case:
    model = built(
        Chroma, in_channels=16, out_channels=4, context_in_dim=16, hidden_size=16, mlp_ratio=2.0, num_heads=2, depth=0,
        depth_single_blocks=1, axes_dim=[2, 2, 4], theta=10000, patch_size=2, qkv_bias=True, in_dim=64, out_dim=16,
        hidden_dim=16, n_layers=1, txt_ids_dims=[], vec_in_dim=8,
    )  # fmt: skip
    return Case(
        model, "single_blocks.0.linear1", SIZE,
        lambda d: model(picture(d, 4), torch.ones(2), noise(2, 7, 16), torch.zeros(2)),
    )  # fmt: skip


def hunyuan_video() -> Case:
    model = built(
        HunyuanVideo, in_channels=4, out_channels=4, vec_in_dim=8, context_in_dim=16, hidden_size=16, mlp_ratio=2.0,
        num_heads=2, depth=0, depth_single_blocks=1, axes_dim=[2, 2, 4], theta=256, patch_size=[1, 2, 2],
        qkv_bias=True, guidance_embed=False, byt5=False, meanflow=False, use_cond_type_embedding=False,
        vision_in_dim=None, meanflow_sum=False,
    )  # fmt: skip
    return Case(
        model, "single_blocks.0.linear1", SIZE,
        lambda d: model(picture(d, 4, 3, 1), torch.ones(1), noise(1, 7, 16), noise(1, 8)),
    )  # fmt: skip


def next_dit(layer: str, refiners: int, padded: int | None) -> Case:
    model = built(
        NextDiT, patch_size=2, in_channels=4, dim=256, n_layers=1, n_refiner_layers=refiners, n_heads=8, n_kv_heads=8,
        multiple_of=8, qk_norm=True, cap_feat_dim=16, axes_dims=[16, 8, 8], axes_lens=[64, 64, 64],
        z_image_modulation=padded is not None, pad_tokens_multiple=padded,
    )  # fmt: skip
    return Case(model, layer, SIZE, lambda d: model(picture(d, 4), torch.ones(2), noise(2, 7, 16), 7))


def qwen(layer: str, *, reference: bool = False) -> Case:
    model = built(
        QwenImageTransformer2DModel, patch_size=2, in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=8, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(2, 2, 4),
    )  # fmt: skip
    more = {"ref_latents": [noise(1, 4, 1, 4, 4)]} if reference else {}
    return Case(model, layer, SIZE, lambda d: model(picture(d, 4, 1, 1), torch.ones(1), noise(1, 7, 16), **more))


def wan() -> Case:
    model = built(
        WanModel, in_dim=4, dim=24, ffn_dim=32, freq_dim=16, text_dim=16, out_dim=4, num_heads=2, num_layers=1
    )
    return Case(model, "blocks.0.self_attn.q", SIZE, lambda d: model(picture(d, 4, 3), torch.ones(2), noise(2, 7, 16)))


def sd3(layer: str) -> Case:
    model = built(
        OpenAISignatureMMDITWrapper, input_size=None, patch_size=2, in_channels=4, depth=1, adm_in_channels=8,
        context_embedder_config={"target": "torch.nn.Linear", "params": {"in_features": 16, "out_features": 64}},
        pos_embed_max_size=16, num_patches=256, x_block_self_attn_layers=[0],
    )  # fmt: skip
    return Case(
        model, layer, SIZE,
        lambda d: model(picture(d, 4), torch.ones(2), context=noise(2, 24, 16), y=noise(2, 8)),
    )  # fmt: skip


def aura_flow() -> Case:
    model = built(
        MMDiT, in_channels=4, out_channels=4, patch_size=2, dim=16, n_layers=2, n_double_layers=1, n_heads=2,
        global_conddim=16, cond_seq_dim=16, max_seq=64,
    )  # fmt: skip
    return Case(model, "double_layers.0.attn.w2q", SIZE, lambda d: model(picture(d, 4), torch.ones(2), noise(2, 7, 16)))


def cog_video() -> Case:
    model = built(
        CogVideoXTransformer3DModel, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        time_embed_dim=8, text_embed_dim=16, num_layers=1, sample_width=12, sample_height=8, sample_frames=9,
        patch_size=2, max_text_seq_length=7,
    )  # fmt: skip
    return Case(model, "blocks.0.q", SIZE, lambda d: model(picture(d, 4, 3), torch.ones(2), noise(2, 7, 16)))


def omni_gen(*, reference: bool = False) -> Case:
    model = built(
        OmniGen2Transformer2DModel, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=0,
        num_attention_heads=2, num_kv_heads=2, multiple_of=8, axes_dim_rope=(4, 4, 4), axes_lens=(64, 64, 64),
        text_feat_dim=16, timestep_scale=1.0,
    )  # fmt: skip
    more = {"ref_latents": [noise(2, 4, 4, 4)]} if reference else {}
    return Case(
        model, "layers.0.attn.to_q", SIZE, lambda d: model(picture(d, 4), torch.ones(2), noise(2, 7, 16), 7, **more)
    )


CASES: dict[str, Callable[[], Case]] = {
    "Flux": lambda: flux("single_blocks.0.linear1"),
    "Flux with a reference": lambda: flux("single_blocks.0.linear1", reference=True),
    "Flux, picture stream": lambda: flux("double_blocks.0.img_attn.qkv", 1),
    "Flux, picture stream with a reference": lambda: flux("double_blocks.0.img_attn.qkv", 1, reference=True),
    "Chroma": chroma,
    "HunyuanVideo": hunyuan_video,
    "Lumina2": lambda: next_dit("layers.0.attention.qkv", 0, None),
    "Lumina2, refiner": lambda: next_dit("noise_refiner.0.attention.qkv", 1, None),
    "Z-Image": lambda: next_dit("layers.0.attention.qkv", 0, 32),
    "Z-Image, refiner": lambda: next_dit("noise_refiner.0.attention.qkv", 1, 32),
    "Qwen-Image": lambda: qwen("transformer_blocks.0.attn.to_q"),
    "Qwen-Image with a reference": lambda: qwen("transformer_blocks.0.attn.to_q", reference=True),
    "Wan": wan,
    "SD3": lambda: sd3("joint_blocks.0.x_block.attn.qkv"),
    "SD3, second attention": lambda: sd3("joint_blocks.0.x_block.attn2.qkv"),
    "AuraFlow": aura_flow,
    "CogVideoX": cog_video,
    "OmniGen2": omni_gen,
    "OmniGen2 with a reference": lambda: omni_gen(reference=True),
}


ATTENDING = (
    "Flux",
    "Flux with a reference",
    "Chroma",
    "Lumina2",
    "Z-Image",
    "Qwen-Image",
    "SD3",
    "AuraFlow",
    "OmniGen2",
)
ATTENTION = {
    **{name: CASES[name] for name in ATTENDING},
    "Flux, double block": lambda: flux("single_blocks.0.linear1", 1),
}


def problem(test: Callable[[Case], None], case: Callable[[], Case]) -> str:
    try:
        test(case())
    except Exception as error:
        return f"{type(error).__name__}: {error}"[:1000] or "failed"
    return ""


def problems(test: Callable[[Case], None], cases: dict[str, Callable[[], Case]]) -> dict[str, str]:
    return {name: problem(test, case) for name, case in cases.items()}


print(json.dumps({"layers": problems(check, CASES), "attention": problems(check_attention, ATTENTION)}))
