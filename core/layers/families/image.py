"""Image models with layers of the usual kind: Z-Image, Lumina 2, Qwen-Image, Krea 2, HiDream, SD 3, PixArt."""

from __future__ import annotations

from .encoders import clip, llama, t5
from .table import Component, Family, Naming, dialect

_LUMINA_BLOCKS = ("layers.#", "noise_refiner.#", "context_refiner.#")
_LUMINA_BLOCK = (
    "attention.qkv attention.out attention.q_norm attention.k_norm feed_forward.w1 feed_forward.w2 feed_forward.w3 "
    "attention_norm1 attention_norm2 ffn_norm1 ffn_norm2"
)
_LUMINA_TOP = "x_embedder t_embedder.mlp.0 t_embedder.mlp.2 cap_embedder.0 cap_embedder.1 final_layer.linear"

_Z_BLOCK = {
    "attention.to_q attention.to_k attention.to_v": "attention.qkv 1 1 1",
    "attention.to_out.0": "attention.out",
    "attention.norm_q": "attention.q_norm",
    "attention.norm_k": "attention.k_norm",
    "feed_forward.w1 feed_forward.w2 feed_forward.w3 attention_norm1 attention_norm2 ffn_norm1 ffn_norm2": "=",
}
_Z_MODULATED = {**_Z_BLOCK, "adaLN_modulation.0": "="}
_Z_IMAGE: Naming = {
    "layers.#": ("layers.#", _Z_MODULATED),
    "noise_refiner.#": ("noise_refiner.#", _Z_MODULATED),
    "context_refiner.#": ("context_refiner.#", _Z_BLOCK),
    "": (
        "",
        {
            "all_x_embedder.2-1": "x_embedder",
            "all_final_layer.2-1.linear": "final_layer.linear",
            "all_final_layer.2-1.adaLN_modulation.1": "final_layer.adaLN_modulation.1",
            "cap_embedder.0 cap_embedder.1 t_embedder.mlp.0 t_embedder.mlp.2": "=",
        },
    ),
}
Z_IMAGE = Family(
    "z_image",
    Component(
        "diffusion_model.",
        {
            "layers.#": f"{_LUMINA_BLOCK} adaLN_modulation.0",
            "noise_refiner.#": f"{_LUMINA_BLOCK} adaLN_modulation.0",
            "context_refiner.#": _LUMINA_BLOCK,
            "": f"{_LUMINA_TOP} final_layer.adaLN_modulation.1",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy"),
            dialect("transformer.", "diffusers", readers="comfy diffusers"),
            dialect("diffusion_model.", "diffusers", readers="comfy"),  # ai-toolkit
            dialect("lora_unet_", "diffusers", readers="kohya"),  # musubi-tuner
            dialect("lycoris_", "diffusers", readers="comfy"),
            dialect("", "diffusers", readers="comfy"),
            dialect(""),
        ),
        {"diffusers": _Z_IMAGE},
    ),
    (llama("qwen3_4b", single=True),),
    ratios={f"{block}.attention.qkv": 3 for block in _LUMINA_BLOCKS},
    hints=("zimage", "z-image", "z_image"),
)

_LUMINA_NAMES = {
    "attn.to_q attn.to_k attn.to_v": "attention.qkv 3 1 1",
    "attn.to_out.0": "attention.out",
    "attn.norm_q": "attention.q_norm",
    "attn.norm_k": "attention.k_norm",
    **{f"feed_forward.linear_{i}": f"feed_forward.w{i}" for i in (1, 2, 3)},
    "norm2": "attention_norm2",
    "ffn_norm1 ffn_norm2": "=",
}
_LUMINA_MODULATED = {**_LUMINA_NAMES, "norm1.linear": "adaLN_modulation.1", "norm1.norm": "attention_norm1"}
_LUMINA: Naming = {
    "layers.#": ("layers.#", _LUMINA_MODULATED),
    "noise_refiner.#": ("noise_refiner.#", _LUMINA_MODULATED),
    "context_refiner.#": ("context_refiner.#", {**_LUMINA_NAMES, "norm1": "attention_norm1"}),
    "": (
        "",
        {
            "x_embedder": "=",
            "time_caption_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_caption_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_caption_embed.caption_embedder.0": "cap_embedder.0",
            "time_caption_embed.caption_embedder.1": "cap_embedder.1",
            "norm_out.linear_1": "final_layer.adaLN_modulation.1",
            "norm_out.linear_2": "final_layer.linear",
        },
    ),
}
LUMINA2 = Family(
    "lumina2",
    Component(
        "diffusion_model.",
        {
            "layers.#": f"{_LUMINA_BLOCK} adaLN_modulation.1",
            "noise_refiner.#": f"{_LUMINA_BLOCK} adaLN_modulation.1",
            "context_refiner.#": _LUMINA_BLOCK,
            "": f"{_LUMINA_TOP} final_layer.adaLN_modulation.1",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", "diffusers", readers="diffusers"),
            dialect(""),
        ),
        {"diffusers": _LUMINA},
    ),
    (llama("gemma2_2b", single=True),),
    ratios={f"{block}.attention.qkv": 3840 / 2304 for block in _LUMINA_BLOCKS},
    hints=("lumina",),
)

_QWEN_BLOCK = (
    "attn.to_q attn.to_k attn.to_v attn.to_out.0 attn.add_q_proj attn.add_k_proj attn.add_v_proj attn.to_add_out "
    "attn.norm_q attn.norm_k attn.norm_added_q attn.norm_added_k img_mlp.net.0.proj img_mlp.net.2 txt_mlp.net.0.proj "
    "txt_mlp.net.2 img_mod.1 txt_mod.1"
)
_QWEN_TOP = (
    "img_in txt_in txt_norm proj_out norm_out.linear time_text_embed.timestep_embedder.linear_1 "
    "time_text_embed.timestep_embedder.linear_2"
)
QWEN_IMAGE = Family(
    "qwen_image",
    Component(
        "diffusion_model.",
        {"transformer_blocks.#": _QWEN_BLOCK, "": _QWEN_TOP},
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", readers="comfy diffusers"),
            dialect("", readers="comfy"),
            dialect("lycoris_", readers="comfy"),
        ),
    ),
    (llama("qwen25_7b", single=True),),
    hints=("qwen",),
)

_KREA_BLOCKS = {
    "transformer_blocks.#": "blocks.#",
    "text_fusion.layerwise_blocks.#": "txtfusion.layerwise_blocks.#",
    "text_fusion.refiner_blocks.#": "txtfusion.refiner_blocks.#",
}
_KREA_NAMES = {
    "attn.to_q": "attn.wq",
    "attn.to_k": "attn.wk",
    "attn.to_v": "attn.wv",
    "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo",
    "attn.to_out": "attn.wo",
    "ff.gate": "mlp.gate",
    "ff.up": "mlp.up",
    "ff.down": "mlp.down",
}
_KREA: Naming = {
    **{theirs: (ours, _KREA_NAMES) for theirs, ours in _KREA_BLOCKS.items()},
    "": (
        "",
        {
            "img_in": "first",
            "time_embed.linear_1": "tmlp.0",
            "time_embed.linear_2": "tmlp.2",
            "time_mod_proj": "tproj.1",
            "txt_in.linear_1": "txtmlp.1",
            "txt_in.linear_2": "txtmlp.3",
            "text_fusion.projector": "txtfusion.projector",
            "final_layer.linear": "last.linear",
        },
    ),
}
KREA2 = Family(
    "krea2",
    Component(
        "diffusion_model.",
        {
            **dict.fromkeys(
                _KREA_BLOCKS.values(), "attn.wq attn.wk attn.wv attn.gate attn.wo mlp.gate mlp.up mlp.down"
            ),
            "": "first tmlp.0 tmlp.2 tproj.1 txtmlp.1 txtmlp.3 txtfusion.projector last.linear",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", "diffusers", readers="comfy diffusers"),
            dialect("diffusion_model.", "diffusers", readers="comfy"),
            dialect("lycoris_", "diffusers", readers="comfy"),
            dialect("", "diffusers", readers="comfy"),
            dialect(""),
        ),
        {"diffusers": _KREA},
    ),
    (llama("qwen3vl_4b", single=True),),
    hints=("krea",),
)

_HIDREAM_ATTENTION = "attn1.to_q attn1.to_k attn1.to_v attn1.to_out attn1.q_rms_norm attn1.k_rms_norm"
_HIDREAM_FF = " ".join(f"ff_i.{group}.w{i}" for group in ("shared_experts", "experts.#") for i in (1, 2, 3))
_HIDREAM_SINGLE = f"adaLN_modulation.1 {_HIDREAM_ATTENTION} {_HIDREAM_FF} ff_i.gate"
HIDREAM = Family(
    "hidream",
    Component(
        "diffusion_model.",
        {
            "double_stream_blocks.#.block": f"{_HIDREAM_SINGLE} ff_t.w1 ff_t.w2 ff_t.w3 "
            + " ".join(f"{name}_t" for name in _HIDREAM_ATTENTION.split()),
            "single_stream_blocks.#.block": _HIDREAM_SINGLE,
            "": "t_embedder.timestep_embedder.linear_1 t_embedder.timestep_embedder.linear_2 "
            "p_embedder.pooled_embedder.linear_1 p_embedder.pooled_embedder.linear_2 x_embedder.proj "
            "final_layer.linear final_layer.adaLN_modulation.1 caption_projection.#.linear",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", readers="comfy diffusers"),
            dialect("lycoris_", readers="comfy"),
            dialect(""),
        ),
    ),
    (clip("clip_l"), clip("clip_g"), t5(), llama("llama")),
    hints=("hidream",),
)

_SD3_SIDES = {
    "x_block": ("norm1", "attn.to_q attn.to_k attn.to_v", "attn.to_out.0", "ff", "attn.norm_q", "attn.norm_k"),
    "context_block": (
        "norm1_context", "attn.add_q_proj attn.add_k_proj attn.add_v_proj", "attn.to_add_out", "ff_context",
        "attn.norm_added_q", "attn.norm_added_k",
    ),
}  # fmt: skip
_SD3_NAMES = {
    name: f"{side}.{target}"
    for side, (norm, qkv, out, ff, norm_q, norm_k) in _SD3_SIDES.items()
    for name, target in (
        # the last context block has only shift and scale, in the other order
        (f"{norm}.linear", "adaLN_modulation.1" + (" swapped2" if side == "context_block" else "")),
        (qkv, "attn.qkv 1 1 1"),
        (out, "attn.proj"),
        (f"{ff}.net.0.proj", "mlp.fc1"),
        (f"{ff}.net.2", "mlp.fc2"),
        (norm_q, "attn.ln_q"),
        (norm_k, "attn.ln_k"),
    )
} | {
    "attn2.to_q attn2.to_k attn2.to_v": "x_block.attn2.qkv 1 1 1",
    "attn2.to_out.0": "x_block.attn2.proj",
    "attn2.norm_q": "x_block.attn2.ln_q",
    "attn2.norm_k": "x_block.attn2.ln_k",
}
_SD3: Naming = {
    "transformer_blocks.#": ("joint_blocks.#", _SD3_NAMES),
    "": (
        "",
        {
            "context_embedder": "=",
            "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
            "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
            "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
            "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
            "pos_embed.proj": "x_embedder.proj",
            "proj_out": "final_layer.linear",
            "norm_out.linear": "final_layer.adaLN_modulation.1 swapped",
        },
    ),
}
_SD3_BLOCK = "attn.qkv attn.proj attn.ln_q attn.ln_k mlp.fc1 mlp.fc2 adaLN_modulation.1"
SD3 = Family(
    "sd3",
    Component(
        "diffusion_model.",
        {
            "joint_blocks.#.x_block": f"{_SD3_BLOCK} attn2.qkv attn2.proj attn2.ln_q attn2.ln_k",
            "joint_blocks.#.context_block": _SD3_BLOCK,
            "": "context_embedder t_embedder.mlp.0 t_embedder.mlp.2 y_embedder.mlp.0 y_embedder.mlp.2 x_embedder.proj "
            "final_layer.linear final_layer.adaLN_modulation.1",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", "diffusers", readers="comfy diffusers"),
            dialect("base_model.model.", "diffusers", readers="comfy"),
            dialect("lora_transformer_", "diffusers", readers="comfy"),  # OneTrainer
            dialect("lycoris_", "diffusers", readers="comfy"),  # SimpleTuner
            dialect("", "diffusers"),
        ),
        {"diffusers": _SD3},
    ),
    (
        clip("clip_l", kohya="lora_te1_", diffusers="text_encoder.", others=("clip_l.",)),
        clip("clip_g", kohya="lora_te2_", diffusers="text_encoder_2.", others=("clip_g.",)),
        t5(kohya=("lora_te3_",), others=("t5.",)),
    ),
    hints=("sd3", "stable-diffusion-3"),
)

_PIXART: Naming = {
    "transformer_blocks.#": (
        "blocks.#",
        {
            "attn1.to_q attn1.to_k attn1.to_v": "attn.qkv 1 1 1",
            "attn1.to_out.0": "attn.proj",
            "attn2.to_q": "cross_attn.q_linear",
            "attn2.to_k attn2.to_v": "cross_attn.kv_linear 1 1",
            "attn2.to_out.0": "cross_attn.proj",
            "ff.net.0.proj": "mlp.fc1",
            "ff.net.2": "mlp.fc2",
        },
    ),
    "": (
        "",
        {
            "pos_embed.proj": "x_embedder.proj",
            "proj_out": "final_layer.linear",
            "adaln_single.linear": "t_block.1",
            "caption_projection.linear_1": "y_embedder.y_proj.fc1",
            "caption_projection.linear_2": "y_embedder.y_proj.fc2",
            **{
                f"adaln_single.emb.{name}_embedder.linear_{i + 1}": f"{target}_embedder.mlp.{2 * i}"
                for name, target in (("timestep", "t"), ("resolution", "csize"), ("aspect_ratio", "ar"))
                for i in range(2)
            },
        },
    ),
}
PIXART = Family(
    "pixart",
    Component(
        "diffusion_model.",
        {
            "blocks.#": "attn.qkv attn.proj cross_attn.q_linear cross_attn.kv_linear cross_attn.proj mlp.fc1 mlp.fc2",
            "": "x_embedder.proj final_layer.linear t_block.1 y_embedder.y_proj.fc1 y_embedder.y_proj.fc2 "
            + " ".join(f"{name}_embedder.mlp.{i}" for name in ("t", "csize", "ar") for i in (0, 2)),
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", "diffusers", readers="comfy diffusers"),
            dialect("base_model.model.", "diffusers", readers="comfy"),
            dialect("unet.base_model.model.", "diffusers", readers="comfy"),
            dialect("", "diffusers"),
        ),
        {"diffusers": _PIXART},
    ),
    (t5(),),
    hints=("pixart",),
)
