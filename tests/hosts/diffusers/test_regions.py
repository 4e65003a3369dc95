"""Regions on diffusers' architectures: where a map acts, compared with where a change of the latent arrives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from ...core.mole.regions.arrivals import Case, check, check_attention, noise


def places(references: int = 0, width: int = 3) -> Tensor:
    """Positions of 4 x 6 tokens, and of tokens of a reference picture."""
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(6.0))
    reference = ids[:references].clone()
    reference[:, 0] = 1
    return nn.functional.pad(torch.cat([ids, reference]), (0, width - 3))


def packed(change: Tensor, channels: int, batch: int = 2, references: int = 0) -> Tensor:
    x = noise(batch, change.numel() + references, channels)
    x[:, : change.numel()] += change.flatten()[:, None]
    return x


def flux(layer: str, *, double: int = 0, references: int = 0) -> Case:
    model = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=double, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip

    def call(change: Tensor) -> Any:
        return model(
            hidden_states=packed(change, 4, references=references), encoder_hidden_states=noise(2, 7, 16),
            pooled_projections=noise(2, 8), timestep=torch.ones(2), img_ids=places(references),
            txt_ids=torch.zeros(7, 3), guidance=torch.ones(2),
        )  # fmt: skip

    return Case(model, layer, (4, 6), call)


def flux2() -> Case:
    model = diffusers.Flux2Transformer2DModel(
        in_channels=4, num_layers=0, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, axes_dims_rope=(2, 2, 2, 2), timestep_guidance_channels=16,
    )  # fmt: skip

    def call(change: Tensor) -> Any:
        return model(
            hidden_states=packed(change, 4), encoder_hidden_states=noise(2, 7, 16), timestep=torch.ones(2),
            img_ids=places(width=4), txt_ids=torch.zeros(7, 4), guidance=torch.ones(2),
        )  # fmt: skip

    return Case(model, "single_transformer_blocks.0.attn.to_qkv_mlp_proj", (4, 6), call)


def sd3(layer: str) -> Case:
    model = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20, out_channels=4,
        dual_attention_layers=(0, 1),
    )  # fmt: skip

    def call(change: Tensor) -> Any:  # as many tokens of text as of picture
        return model(
            hidden_states=noise(2, 4, 8, 8) + change, encoder_hidden_states=noise(2, 16, 24),
            pooled_projections=noise(2, 20), timestep=torch.ones(2),
        )  # fmt: skip

    return Case(model, layer, (8, 8), call)


def lumina2(layer: str, refiners: int) -> Case:
    """The texts of a batch have different lengths, and no padding in the joint sequence."""
    model = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=1, num_refiner_layers=refiners,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128), cap_feat_dim=8,
    )  # fmt: skip
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[0, 5:] = 0

    def call(change: Tensor) -> Any:
        return model(
            hidden_states=noise(2, 4, 8, 12) + change, timestep=torch.ones(2), encoder_hidden_states=noise(2, 9, 8),
            encoder_attention_mask=mask,
        )  # fmt: skip

    return Case(model, layer, (8, 12), call)


def qwen(layer: str, references: int = 0) -> Case:
    model = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=1, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip

    def call(change: Tensor) -> Any:
        return model(
            hidden_states=packed(change, 16, 1, 24 * references), encoder_hidden_states=noise(1, 7, 16),
            encoder_hidden_states_mask=torch.ones(1, 7, dtype=torch.long), timestep=torch.ones(1),
            img_shapes=[[(1, 4, 6)] * (1 + references)],
        )  # fmt: skip

    return Case(model, layer, (4, 6), call)


def wan() -> Case:
    model = diffusers.WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4,
        text_dim=16, freq_dim=256, ffn_dim=32, num_layers=1,
    )  # fmt: skip
    inputs = {"timestep": torch.ones(2), "encoder_hidden_states": noise(2, 7, 16)}
    return Case(
        model, "blocks.0.attn1.to_q", (8, 12), lambda d: model(hidden_states=noise(2, 4, 3, 8, 12) + d, **inputs)
    )


def pixart() -> Case:
    model = diffusers.PixArtTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1,
        cross_attention_dim=16, sample_size=8, patch_size=2, caption_channels=16, use_additional_conditions=False,
    )  # fmt: skip
    inputs = {
        "encoder_hidden_states": noise(2, 7, 16), "timestep": torch.ones(2),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }  # fmt: skip
    return Case(
        model, "transformer_blocks.0.attn1.to_q", (8, 8), lambda d: model(hidden_states=noise(2, 4, 8, 8) + d, **inputs)
    )


def sana() -> Case:
    model = diffusers.SanaTransformer2DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=1,
        num_cross_attention_heads=2, cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=16,
        sample_size=8, patch_size=1,
    )  # fmt: skip
    inputs = {"encoder_hidden_states": noise(2, 7, 16), "timestep": torch.ones(2)}
    return Case(
        model, "transformer_blocks.0.attn1.to_q", (8, 8), lambda d: model(hidden_states=noise(2, 4, 8, 8) + d, **inputs)
    )


def z_image(layer: str) -> Case:
    """Pictures and texts are lists, padded to 32 tokens each."""
    model = diffusers.ZImageTransformer2DModel(
        all_patch_size=(2,), all_f_patch_size=(1,), in_channels=4, dim=24, n_layers=1, n_refiner_layers=0, n_heads=2,
        n_kv_heads=2, cap_feat_dim=16, axes_dims=[4, 4, 4], axes_lens=[256, 64, 64],
    )  # fmt: skip

    def call(change: Tensor) -> Any:
        x = noise(4, 1, 8, 12)
        return model([x + change, x / 2 + change], torch.ones(2), [noise(7, 16), noise(5, 16)], return_dict=False)

    return Case(model, layer, (8, 12), call)


def hunyuan_video() -> Case:
    model = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=0,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=False,
        text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip

    def call(change: Tensor) -> Any:
        return model(
            hidden_states=noise(1, 4, 3, 8, 12) + change, timestep=torch.ones(1), pooled_projections=noise(1, 8),
            encoder_hidden_states=noise(1, 7, 16), encoder_attention_mask=torch.ones(1, 7),
        )  # fmt: skip

    return Case(model, "single_transformer_blocks.0.attn.to_q", (8, 12), call)


def ltx() -> Case:
    model = diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=1, caption_channels=16,
    )  # fmt: skip

    def call(change: Tensor) -> Any:
        return model(
            hidden_states=packed(change.repeat(3, 1), 4, 1), encoder_hidden_states=noise(1, 7, 16),
            timestep=torch.ones(1), encoder_attention_mask=torch.ones(1, 7), num_frames=3, height=4, width=6,
        )  # fmt: skip

    return Case(model, "transformer_blocks.0.attn1.to_q", (4, 6), call)


def aura_flow(layer: str) -> Case:
    """Eight register tokens come before the text."""
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_mmdit_layers=1, num_single_dit_layers=1, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=16, caption_projection_dim=16, out_channels=4, pos_embed_max_size=16,
    )  # fmt: skip
    inputs = {"encoder_hidden_states": noise(2, 7, 16), "timestep": torch.ones(2)}
    return Case(model, layer, (8, 8), lambda d: model(hidden_states=noise(2, 4, 8, 8) + d, **inputs))


def cog_video() -> Case:
    """Frames come before channels."""
    model = diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4, time_embed_dim=8, text_embed_dim=16,
        num_layers=1, sample_width=8, sample_height=4, sample_frames=9, patch_size=2, max_text_seq_length=7,
    )  # fmt: skip
    inputs = {"encoder_hidden_states": noise(2, 7, 16), "timestep": torch.ones(2)}
    layer = "transformer_blocks.0.attn1.to_q"
    return Case(model, layer, (4, 8), lambda d: model(hidden_states=noise(2, 3, 4, 4, 8) + d, **inputs))


SINGLE = "single_transformer_blocks.0.attn.to_q"
CASES: dict[str, Callable[[], Case]] = {
    "Flux": lambda: flux(SINGLE),
    "Flux with a reference": lambda: flux(SINGLE, references=5),
    "Flux, picture stream": lambda: flux("transformer_blocks.0.attn.to_q", double=1),
    "Flux, picture stream with a reference": lambda: flux("x_embedder", references=5),
    "Flux.2": flux2,
    "SD3": lambda: sd3("transformer_blocks.0.attn.to_q"),
    "SD3, second attention": lambda: sd3("transformer_blocks.0.attn2.to_k"),
    "Lumina2": lambda: lumina2("layers.0.attn.to_q", 0),
    "Lumina2, refiner": lambda: lumina2("noise_refiner.0.attn.to_q", 1),
    "Qwen-Image": lambda: qwen("transformer_blocks.0.attn.to_q"),
    "Qwen-Image with a reference": lambda: qwen("img_in", 1),
    "Wan": wan,
    "PixArt": pixart,
    "Sana": sana,
    "Z-Image": lambda: z_image("layers.0.attention.to_q"),
    "Z-Image, patches": lambda: z_image("all_x_embedder.2-1"),
    "HunyuanVideo": hunyuan_video,
    "LTX": ltx,
    "AuraFlow": lambda: aura_flow("joint_transformer_blocks.0.attn.to_q"),
    "CogVideoX": cog_video,
}


@pytest.mark.parametrize("name", CASES)
def test_a_map_acts_where_its_part_of_the_picture_is(name: str) -> None:
    torch.manual_seed(0)
    check(CASES[name]())


ATTENTION: dict[str, Callable[[], Case]] = {
    **{
        name: CASES[name]
        for name in ("Flux", "Flux with a reference", "Flux.2", "SD3", "Lumina2", "PixArt", "AuraFlow")
    },
    "Flux, double block": lambda: flux(SINGLE, double=1),
    "Qwen-Image": CASES["Qwen-Image"],
    "Qwen-Image with a reference": CASES["Qwen-Image with a reference"],
}


@pytest.mark.parametrize("name", ATTENTION)
def test_automatic_regions_read_the_attention_of_the_picture_to_the_text(name: str) -> None:
    torch.manual_seed(0)
    check_attention(ATTENTION[name]())
