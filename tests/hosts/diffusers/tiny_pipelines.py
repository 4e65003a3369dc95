"""Tiny random pipelines with all components of real ones, tokenizers and text encoders too."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from torch import nn

LETTERS = "abcdefghijklmnopqrstuvwxyz,"
TOKENS = 40  # maximum prompt length; a letter is a token


def clip_tokenizer() -> Any:
    """A tokenizer whose tokens are letters; the last letter of a word has another token, as in CLIP."""
    words = ["<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{c}</w>" for c in LETTERS)]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=TOKENS)


def t5_tokenizer() -> Any:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *((c, -2.0) for c in LETTERS)]
    return transformers.T5Tokenizer(vocab=pieces, extra_ids=0)


def clip_config(hidden: int, projection: int) -> Any:
    return transformers.CLIPTextConfig(
        vocab_size=2 + 2 * len(LETTERS), hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=2,
        num_attention_heads=2, projection_dim=projection, max_position_embeddings=TOKENS, bos_token_id=0,
        eos_token_id=1, pad_token_id=1,
    )  # fmt: skip


def t5(hidden: int) -> Any:
    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=4 + len(LETTERS), d_model=hidden, d_kv=4, d_ff=2 * hidden, num_layers=1, num_heads=2
        )
    )


def vae(channels: int, shift: float | None = 0.1) -> Any:
    return diffusers.AutoencoderKL(
        block_out_channels=(4, 4), down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=channels, norm_num_groups=2, sample_size=16,
        shift_factor=shift, scaling_factor=0.5,
    )  # fmt: skip


def unet(**options: Any) -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        **options,
    )  # fmt: skip


def _sd15(scheduler: Any) -> Any:
    return diffusers.StableDiffusionPipeline(
        vae=vae(4, None), text_encoder=transformers.CLIPTextModel(clip_config(8, 8)), tokenizer=clip_tokenizer(),
        unet=unet(cross_attention_dim=8), scheduler=scheduler or ddim(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(scheduler: Any) -> Any:
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(4, None), text_encoder=transformers.CLIPTextModel(clip_config(8, 8)), tokenizer=clip_tokenizer(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config(12, 6)), tokenizer_2=clip_tokenizer(),
        unet=unet(
            cross_attention_dim=20, addition_embed_type="text_time", addition_time_embed_dim=4,
            projection_class_embeddings_input_dim=6 + 6 * 4,
        ),
        scheduler=scheduler or diffusers.EulerDiscreteScheduler(**SD_BETAS),
    )  # fmt: skip


def _sd3(scheduler: Any) -> Any:
    transformer = diffusers.SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=24, caption_projection_dim=16, pooled_projection_dim=20, out_channels=4,
    )  # fmt: skip
    return diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=vae(4),
        scheduler=scheduler or diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        text_encoder=transformers.CLIPTextModelWithProjection(clip_config(8, 8)), tokenizer=clip_tokenizer(),
        text_encoder_2=transformers.CLIPTextModelWithProjection(clip_config(12, 12)), tokenizer_2=clip_tokenizer(),
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip


def _flux(scheduler: Any) -> Any:
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(2, 2, 4), guidance_embeds=True,
    )  # fmt: skip
    dynamic = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return diffusers.FluxPipeline(
        scheduler=scheduler or dynamic, vae=vae(1), text_encoder=transformers.CLIPTextModel(clip_config(8, 8)),
        tokenizer=clip_tokenizer(), text_encoder_2=t5(16), tokenizer_2=t5_tokenizer(), transformer=transformer,
    )  # fmt: skip


def word_tokenizer(*special: str) -> Any:
    """A tokenizer whose tokens are words and punctuation marks; unknown words share one."""
    names = ["<pad>", "<unk>", *special, "a", "heart", "ember", "burning", "style", "in", "on", "the", "x", "blur", ","]
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, "<unk>"))
    model.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=model, pad_token="<pad>", unk_token="<unk>")


def _lumina2() -> Any:
    """A language model's states with padding and a mask; two passes without names, encoded at once."""
    config = transformers.Gemma2Config(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, head_dim=4,
        num_key_value_heads=1, query_pre_attn_scalar=4, pad_token_id=0,
    )  # fmt: skip
    transformer = diffusers.Lumina2Transformer2DModel(
        sample_size=4, patch_size=2, in_channels=4, hidden_size=24, num_layers=2, num_refiner_layers=1,
        num_attention_heads=3, num_kv_heads=1, multiple_of=2, scaling_factor=1.0, axes_dim_rope=(4, 2, 2),
        axes_lens=(128, 128, 128), cap_feat_dim=8,
    )  # fmt: skip
    pipe = diffusers.Lumina2Pipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(4),
        text_encoder=transformers.Gemma2Model(config), tokenizer=word_tokenizer(),
    )  # fmt: skip
    pipe.system_prompt = "a style"
    return pipe


def _qwen() -> Any:
    """A language model's states without those of a template, with a mask; the passes have names."""
    config = transformers.Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, pad_token_id=0,
    )  # fmt: skip
    transformer = diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=16, guidance_embeds=False, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip
    coder = diffusers.AutoencoderKLQwenImage(
        base_dim=4, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.0] * 4, latents_std=[1.0] * 4,
    )  # fmt: skip
    pipe = diffusers.QwenImagePipeline(
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=coder,
        text_encoder=transformers.Qwen2Model(config), tokenizer=word_tokenizer("<system>", "<user>", "<assistant>"),
    )  # fmt: skip
    pipe.prompt_template_encode, pipe.prompt_template_encode_start_idx = "system a style user {} assistant", 4
    return pipe


SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
PIPELINES = {"SD 1.5": _sd15, "SDXL": _sdxl, "SD3": _sd3, "Flux": _flux}
OF_LANGUAGE_MODELS = {"Lumina2": _lumina2, "Qwen-Image": _qwen}  # gates cannot be trained on these


def build(name: str, scheduler: Any = None) -> Any:
    """Build one of `PIPELINES` or `OF_LANGUAGE_MODELS`, always with the same weights."""
    torch.manual_seed(0)
    pipe = OF_LANGUAGE_MODELS[name]() if name in OF_LANGUAGE_MODELS else PIPELINES[name](scheduler)
    pipe.set_progress_bar_config(disable=True)
    for part in pipe.components.values():
        if isinstance(part, nn.Module):
            part.eval()
    return pipe


def ddim(**options: Any) -> Any:
    return diffusers.DDIMScheduler(**SD_BETAS, clip_sample=False, timestep_spacing="trailing", **options)


def clip() -> tuple[Any, Any]:
    """A CLIP model and its processor."""
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=12, patch_size=4,
        projection_dim=6,
    )  # fmt: skip
    config = transformers.CLIPConfig(
        text_config=clip_config(8, 6).to_dict(), vision_config=vision.to_dict(), projection_dim=6
    )
    processor = transformers.CLIPImageProcessor(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12})
    return transformers.CLIPModel(config).eval(), transformers.CLIPProcessor(processor, clip_tokenizer())


def component(pipe: Any) -> str:
    return "unet" if hasattr(pipe, "unet") else "transformer"


LAYERS = ("to_q", "to_v", "to_out.0")


def lora(pipe: Any, seed: int, *, rank: int = 3, kinds: Sequence[str] = LAYERS) -> Adapter:
    """A LoRA with diffusers' names, large enough to change samples visibly."""
    name = component(pipe)
    g = torch.Generator().manual_seed(seed)
    modules = {
        f"{name}.{path}": LowRank(
            torch.randn(rank, layer.weight[0].numel(), generator=g),
            0.3 * torch.randn(layer.weight.shape[0], rank, generator=g),
            2.0,
            tuple(layer.weight.shape[2:]),
        )
        for path, layer in getattr(pipe, name).named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and path.endswith(tuple(kinds))
    }
    return Adapter(modules)
