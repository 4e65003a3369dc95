"""Models of two streams and then one: FLUX.1, Chroma, FLUX.2 and HunyuanVideo."""

from __future__ import annotations

from .encoders import clip, llama, t5
from .table import Component, Family, Naming, dialect

_STREAM = "attn.qkv {0}_attn.proj {0}_attn.norm.query_norm {0}_attn.norm.key_norm {0}_mlp.0 {0}_mlp.2"
_DOUBLE = " ".join(f"{stream}_{_STREAM.format(stream)}" for stream in ("img", "txt"))
_SINGLE = "linear1 linear2 norm.query_norm norm.key_norm"
_MODULATED = "img_mod.lin txt_mod.lin"
_EMBEDDERS = "time_in.in_layer time_in.out_layer guidance_in.in_layer guidance_in.out_layer"
_VECTOR = "vector_in.in_layer vector_in.out_layer"
_FINAL = "final_layer.linear final_layer.adaLN_modulation.1"

_DOUBLE_ATTENTION = {
    "attn.to_q attn.to_k attn.to_v": "img_attn.qkv 1 1 1",
    "attn.add_q_proj attn.add_k_proj attn.add_v_proj": "txt_attn.qkv 1 1 1",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
}
_DOUBLE_FF = {
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_DOUBLE_FF_2 = {
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_MODULATIONS = {"norm1.linear": "img_mod.lin", "norm1_context.linear": "txt_mod.lin"}
_SINGLE_SPLIT = {
    "attn.to_q attn.to_k attn.to_v proj_mlp": "linear1 1 1 1 4",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_TOP = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1 swapped",
}
_TIME_TEXT = {
    f"time_text_embed.{name}_embedder.linear_{i + 1}": f"{target}_in.{layer}"
    for name, target in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector"))
    for i, layer in enumerate(("in_layer", "out_layer"))
}
_DIFFUSERS: Naming = {
    "transformer_blocks.#": ("double_blocks.#", {**_DOUBLE_ATTENTION, **_DOUBLE_FF, **_DOUBLE_FF_2, **_MODULATIONS}),
    "single_transformer_blocks.#": ("single_blocks.#", _SINGLE_SPLIT),
    "": ("", {**_TOP, **_TIME_TEXT}),
}
# attention processors of XLabs; OMI's names number the parts of fused layers
_XLABS: Naming = {
    "double_blocks.#": (
        "double_blocks.#",
        {
            "processor.qkv_lora1": "img_attn.qkv",
            "processor.qkv_lora2": "txt_attn.qkv",
            "processor.proj_lora1": "img_attn.proj",
            "processor.proj_lora2": "txt_attn.proj",
        },
    ),
    "single_blocks.#": ("single_blocks.#", {"processor.qkv_lora _": "linear1 3 4", "processor.proj_lora": "linear2"}),
}
_NUMBERED: Naming = {
    "double_blocks.#": (
        "double_blocks.#",
        {f"{s}_attn.qkv.0 {s}_attn.qkv.1 {s}_attn.qkv.2": f"{s}_attn.qkv 1 1 1" for s in ("img", "txt")},
    ),
    "single_blocks.#": ("single_blocks.#", {"linear1.0 linear1.1 linear1.2 linear1.3": "linear1 1 1 1 4"}),
}

_FLUX_DIALECTS = (
    dialect("diffusion_model.", readers="comfy"),
    dialect("lora_unet_", readers="comfy kohya"),
    dialect("transformer.", "diffusers", readers="comfy diffusers"),
    dialect("lora_transformer_", "diffusers", readers="comfy"),  # OneTrainer
    dialect("lycoris_", "diffusers", readers="comfy"),  # SimpleTuner
    dialect("", "diffusers", readers="comfy"),  # DiffSynth
    dialect("base_model.model."),
    dialect(""),  # control LoRAs of Black Forest Labs
    dialect("", "xlabs"),
    dialect("diffusion_model.", "xlabs"),
    dialect("transformer.", "numbered"),
)
_FLUX_ENCODERS = (
    clip("clip_l", kohya="lora_te1_", diffusers="text_encoder.", others=("clip_l.",)),
    t5(kohya=("lora_te3_", "lora_te2_"), others=("text_encoder_2.", "t5.")),
)
FLUX = Family(
    "flux",
    Component(
        "diffusion_model.",
        {
            "double_blocks.#": f"{_DOUBLE} {_MODULATED}",
            "single_blocks.#": f"{_SINGLE} modulation.lin",
            "": f"img_in txt_in {_EMBEDDERS} {_VECTOR} {_FINAL}",
        },
        _FLUX_DIALECTS,
        {"diffusers": _DIFFUSERS, "xlabs": _XLABS, "numbered": _NUMBERED},
    ),
    _FLUX_ENCODERS,
    ratios={"single_blocks.#.linear1": 7, "double_blocks.#.img_mlp.0": 4, "double_blocks.#.txt_mlp.0": 4},
    depth={"double_blocks": 19, "single_blocks": 38},
    hints=("flux1", "flux-1", "flux.1"),
)

_CHROMA: Naming = {
    "transformer_blocks.#": ("double_blocks.#", {**_DOUBLE_ATTENTION, **_DOUBLE_FF}),
    "single_transformer_blocks.#": (
        "single_blocks.#",
        {name: target for name, target in _SINGLE_SPLIT.items() if name != "norm.linear"},
    ),
    "distilled_guidance_layer.layers.#": (
        "distilled_guidance_layer.layers.#",
        {"!linear_1": "in_layer", "!linear_2": "out_layer"},
    ),
    # ComfyUI reads these under its own prefix only
    "distilled_guidance_layer": ("distilled_guidance_layer", {"!in_proj !out_proj !norms.#": "="}),
    "": ("", {name: target for name, target in _TOP.items() if "swapped" not in target}),
}
CHROMA = Family(
    "chroma",
    Component(
        "diffusion_model.",
        {
            "double_blocks.#": _DOUBLE,
            "single_blocks.#": _SINGLE,
            "distilled_guidance_layer.layers.#": "in_layer out_layer",
            "distilled_guidance_layer": "in_proj out_proj norms.#",
            "": "img_in txt_in final_layer.linear",
        },
        _FLUX_DIALECTS[:8],
        {"diffusers": _CHROMA},
    ),
    (t5(),),
    ratios={"single_blocks.#.linear1": 7, "double_blocks.#.img_mlp.0": 4, "double_blocks.#.txt_mlp.0": 4},
    depth={"double_blocks": 19, "single_blocks": 38},
    hints=("chroma",),
)

# blocks as FLUX.1's, but gated, without own modulation; ComfyUI has no diffusers names for what is new outside of them
_FLUX2_STREAMS = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")
_FLUX2: Naming = {
    "transformer_blocks.#": ("double_blocks.#", {**_DOUBLE_ATTENTION, **_DOUBLE_FF_2}),
    "single_transformer_blocks.#": (
        "single_blocks.#",
        {
            "attn.to_qkv_mlp_proj": "linear1",
            "attn.to_out": "linear2",
            "attn.norm_q": "norm.query_norm",
            "attn.norm_k": "norm.key_norm",
        },
    ),
    "": (
        "",
        {
            **_TOP,
            **{f"!{name}.linear": f"{name}.lin" for name in _FLUX2_STREAMS},
            **{
                f"!time_guidance_embed.{name}_embedder.linear_{i + 1}": f"{target}_in.{layer}"
                for name, target in (("timestep", "time"), ("guidance", "guidance"))
                for i, layer in enumerate(("in_layer", "out_layer"))
            },
        },
    ),
}
FLUX2 = Family(
    "flux2",
    Component(
        "diffusion_model.",
        {
            "double_blocks.#": _DOUBLE,
            "single_blocks.#": _SINGLE,
            "": f"img_in txt_in {_EMBEDDERS} {_FINAL} {' '.join(f'{name}.lin' for name in _FLUX2_STREAMS)}",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", "diffusers", readers="comfy diffusers"),
            dialect("lycoris_", "diffusers", readers="comfy"),
            dialect("", "diffusers", readers="comfy"),
            dialect("base_model.model."),
            dialect(""),
        ),
        {"diffusers": _FLUX2},
    ),
    (llama("mistral3_24b"), llama("qwen3_4b"), llama("qwen3_8b")),
    ratios={"single_blocks.#.linear1": 9, "double_blocks.#.img_mlp.0": 6, "double_blocks.#.txt_mlp.0": 6},
    hints=("flux2", "flux-2", "flux.2", "klein"),
)

_REFINER = "txt_in.individual_token_refiner.blocks.#"
_ORIGINAL_STREAMS = {
    f"{stream}_{name}": f"{stream}_{target}"
    for stream in ("img", "txt")
    for name, target in (
        ("attn_qkv", "attn.qkv"),
        ("attn_proj", "attn.proj"),
        ("mlp.fc1", "mlp.0"),
        ("mlp.fc2", "mlp.2"),
        ("mod.linear", "mod.lin"),
        ("!attn_q_norm", "attn.norm.query_norm"),
        ("!attn_k_norm", "attn.norm.key_norm"),
    )
    if not name.startswith("!")
}
_SAME_IN_BOTH = (
    f"{_FINAL} time_in.in_layer time_in.out_layer img_in.proj txt_in.input_embedder txt_in.t_embedder.in_layer "
    "txt_in.t_embedder.out_layer txt_in.c_embedder.in_layer txt_in.c_embedder.out_layer"
)
_NEW_IN_15 = (
    "byt5_in.layernorm byt5_in.fc1 byt5_in.fc2 byt5_in.fc3 time_r_in.in_layer time_r_in.out_layer vision_in.proj.0 "
    "vision_in.proj.1 vision_in.proj.3 vision_in.proj.4 cond_type_embedding"
)
# Tencent's own names, with the changes that ComfyUI knows
_ORIGINAL = {
    "double_blocks.#": ("double_blocks.#", _ORIGINAL_STREAMS),
    "single_blocks.#": ("single_blocks.#", {"linear1 linear2": "=", "modulation.linear": "modulation.lin"}),
    _REFINER: (
        _REFINER,
        {
            "self_attn_qkv": "self_attn.qkv",
            "self_attn_proj": "self_attn.proj",
            "mlp.fc1": "mlp.0",
            "mlp.fc2": "mlp.2",
            "adaLN_modulation.1 norm1 norm2": "=",
        },
    ),
}
# names that Tencent's files have and ComfyUI's LoRA loader does not know
_ORIGINAL_ONLY: Naming = {
    "": (
        "",
        {
            f"{name}.mlp.{2 * i}": f"{name}.{layer}"
            for name in ("time_in", "guidance_in", "txt_in.t_embedder")
            for i, layer in enumerate(("in_layer", "out_layer"))
        }
        | {f"txt_in.c_embedder.linear_{i + 1}": f"txt_in.c_embedder.{('in', 'out')[i]}_layer" for i in range(2)},
    ),
}
_REFINER_EMBED = "context_embedder.time_text_embed"
_HUNYUAN: Naming = {
    "transformer_blocks.#": ("double_blocks.#", {**_DOUBLE_ATTENTION, **_DOUBLE_FF, **_MODULATIONS}),
    "single_transformer_blocks.#": ("single_blocks.#", _SINGLE_SPLIT),
    "context_embedder.token_refiner.refiner_blocks.#": (
        _REFINER,
        {
            "attn.to_q attn.to_k attn.to_v": "self_attn.qkv 1 1 1",
            "attn.to_out.0": "self_attn.proj",
            "ff.net.0.proj": "mlp.0",
            "ff.net.2": "mlp.2",
            "norm_out.linear": "adaLN_modulation.1",
            "norm1 norm2": "=",
        },
    ),
    "": (
        "",
        {
            "x_embedder.proj": "img_in.proj",
            "context_embedder.proj_in": "txt_in.input_embedder",
            f"{_REFINER_EMBED}.timestep_embedder.linear_1": "txt_in.t_embedder.in_layer",
            f"{_REFINER_EMBED}.timestep_embedder.linear_2": "txt_in.t_embedder.out_layer",
            f"{_REFINER_EMBED}.text_embedder.linear_1": "txt_in.c_embedder.in_layer",
            f"{_REFINER_EMBED}.text_embedder.linear_2": "txt_in.c_embedder.out_layer",
            "proj_out": "final_layer.linear",
            "norm_out.linear": "final_layer.adaLN_modulation.1 swapped",
        },
    ),
}
_HUNYUAN_TOP = {
    "context_embedder_2.norm": "byt5_in.layernorm",
    **{f"context_embedder_2.linear_{i}": f"byt5_in.fc{i}" for i in (1, 2, 3)},
    "image_embedder.norm_in": "vision_in.proj.0",
    "image_embedder.linear_1": "vision_in.proj.1",
    "image_embedder.linear_2": "vision_in.proj.3",
    "image_embedder.norm_out": "vision_in.proj.4",
    "time_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "cond_type_embed": "cond_type_embedding",
}
_HUNYUAN_DIALECTS = (
    dialect("diffusion_model.", readers="comfy"),
    dialect("lora_unet_", "original", readers="kohya"),  # musubi-tuner
    dialect("lora_unet_", readers="comfy"),
    dialect("transformer.", "original", readers="comfy"),  # diffusion-pipe
    dialect("diffusion_model.", "original", readers="comfy"),
    dialect("transformer.", "diffusers", readers="diffusers"),
    dialect("", "original"),
    dialect("transformer.", "original_only"),
)


def _hunyuan(naming: Naming, top: str, *, single: bool) -> Component:
    """A HunyuanVideo.

    Args:
        naming: diffusers' names.
        top: Canonical names outside of blocks.
        single: Whether there are single blocks.
    """
    layers = {
        "double_blocks.#": f"{_DOUBLE} {_MODULATED}",
        _REFINER: "adaLN_modulation.1 norm1 norm2 self_attn.qkv self_attn.proj mlp.0 mlp.2",
        "": top,
    }
    if single:
        layers["single_blocks.#"] = f"{_SINGLE} modulation.lin"
    kept = {block: rows for block, rows in naming.items() if single or "single" not in block}
    original = {block: rows for block, rows in _ORIGINAL.items() if single or "single" not in block}
    original[""] = ("", {top: "="})
    namings = {"diffusers": kept, "original": original, "original_only": _ORIGINAL_ONLY}
    return Component("diffusion_model.", layers, _HUNYUAN_DIALECTS, namings)


HUNYUAN_VIDEO = Family(
    "hunyuan_video",
    _hunyuan(
        {**_HUNYUAN, "": ("", {**_HUNYUAN[""][1], **_TIME_TEXT})},
        f"{_SAME_IN_BOTH} guidance_in.in_layer guidance_in.out_layer {_VECTOR}",
        single=True,
    ),
    (clip("clip_l", kohya="lora_te1_", others=("text_encoder_2.",)), llama("llama")),
    ratios={"single_blocks.#.linear1": 7, "double_blocks.#.img_mlp.0": 4, "double_blocks.#.txt_mlp.0": 4},
    depth={"double_blocks": 20, "single_blocks": 40},
    hints=("hunyuan",),
)
HUNYUAN_VIDEO_15 = Family(
    "hunyuan_video15",
    _hunyuan(
        {**_HUNYUAN, "": ("", {**_HUNYUAN[""][1], **_HUNYUAN_TOP})}, f"{_SAME_IN_BOTH} {_NEW_IN_15}", single=False
    ),
    (llama("qwen25_7b"),),
    ratios={"double_blocks.#.img_mlp.0": 4, "double_blocks.#.txt_mlp.0": 4},
    depth={"double_blocks": 54},
    hints=("hunyuan-video-1.5", "hunyuanvideo-1.5", "hunyuan-1.5"),
)
