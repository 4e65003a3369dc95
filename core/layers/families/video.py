"""Video models with layers of the usual kind: Wan 2.1 and 2.2, LTX-Video, LTX-2, and Cosmos with Anima."""

from __future__ import annotations

from .encoders import llama, t5
from .table import Component, Family, Naming, dialect

_WAN_BLOCK = (
    "self_attn.q self_attn.k self_attn.v self_attn.o self_attn.norm_q self_attn.norm_k cross_attn.q cross_attn.k "
    "cross_attn.v cross_attn.o cross_attn.norm_q cross_attn.norm_k ffn.0 ffn.2 norm3 modulation"
)
_WAN_TOP = (
    "patch_embedding text_embedding.0 text_embedding.2 time_embedding.0 time_embedding.2 time_projection.1 head.head "
    "head.modulation"
)
_WAN_IMAGE = "img_emb.proj.0 img_emb.proj.1 img_emb.proj.3 img_emb.proj.4"
_WAN_ATTENTION = {
    f"{theirs}.{name}": f"{ours}.{target}"
    for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
    for name, target in (("to_q", "q"), ("to_k", "k"), ("to_v", "v"), ("to_out.0", "o"), ("norm_q norm_k", "="))
    if target != "="
}
_WAN_NAMES = {
    **_WAN_ATTENTION,
    **{
        f"{theirs}.{name}": f"{ours}.{name}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name in ("norm_q", "norm_k")
    },
    "attn2.add_k_proj": "cross_attn.k_img",
    "attn2.add_v_proj": "cross_attn.v_img",
    "attn2.norm_added_k": "cross_attn.norm_k_img",
    "ffn.net.0.proj": "ffn.0",
    "ffn.net.2": "ffn.2",
    "norm2": "norm3",
    "scale_shift_table": "modulation",
}
_WAN: Naming = {
    "blocks.#": ("blocks.#", _WAN_NAMES),
    "vace_blocks.#": ("vace_blocks.#", {**_WAN_NAMES, "proj_in": "before_proj", "proj_out": "after_proj"}),
    "face_adapter.#": (
        "face_adapter.fuser_blocks.#",
        {
            "to_q": "linear1_q",
            "to_k to_v": "linear1_kv 1 1",
            "to_out": "linear2",
            "norm_q": "q_norm",
            "norm_k": "k_norm",
        },
    ),
    "condition_embedder": (
        "",
        {
            "time_embedder.linear_1": "time_embedding.0",
            "time_embedder.linear_2": "time_embedding.2",
            "text_embedder.linear_1": "text_embedding.0",
            "text_embedder.linear_2": "text_embedding.2",
            "time_proj": "time_projection.1",
            "image_embedder.norm1": "img_emb.proj.0",
            "image_embedder.ff.net.0.proj": "img_emb.proj.1",
            "image_embedder.ff.net.2": "img_emb.proj.3",
            "image_embedder.norm2": "img_emb.proj.4",
        },
    ),
    "": (
        "",
        {
            "patch_embedding vace_patch_embedding pose_patch_embedding face_encoder.out_proj": "=",
            "face_encoder.conv1_local": "face_encoder.conv1_local.conv",
            "face_encoder.conv2": "face_encoder.conv2.conv",
            "face_encoder.conv3": "face_encoder.conv3.conv",
            "proj_out": "head.head",
            "scale_shift_table": "head.modulation",
        },
    ),
}
WAN = Family(
    "wan",
    Component(
        "diffusion_model.",
        {
            "blocks.#": f"{_WAN_BLOCK} cross_attn.k_img cross_attn.v_img cross_attn.norm_k_img",
            "vace_blocks.#": f"{_WAN_BLOCK} before_proj after_proj",
            "face_adapter.fuser_blocks.#": "linear1_q linear1_kv linear2 q_norm k_norm",
            "": f"{_WAN_TOP} {_WAN_IMAGE} vace_patch_embedding pose_patch_embedding face_encoder.conv1_local.conv "
            "face_encoder.conv2.conv face_encoder.conv3.conv face_encoder.out_proj",
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),  # musubi-tuner
            dialect("transformer.", "diffusers", readers="diffusers"),
            # VideoX-Fun; ComfyUI reads it in whole files with a certain key only
            dialect("lora_unet__"),
            dialect(""),
        ),
        {"diffusers": _WAN},
    ),
    (t5("umt5xxl"),),
    hints=("wan",),
)


def _attentions(names: str) -> str:
    """Layers of the attentions with these names, in ComfyUI's words, which but for the norms are diffusers'."""
    return " ".join(
        f"{name}.{layer}"
        for name in names.split()
        for layer in ("to_q", "to_k", "to_v", "to_out.0", "q_norm", "k_norm")
    )


def _ltx_block(attentions: str, feedforwards: str) -> dict[str, str]:
    same = [f"{name}.{layer}" for name in attentions.split() for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    same += [f"{name}.{layer}" for name in feedforwards.split() for layer in ("net.0.proj", "net.2")]
    norms = {f"{name}.norm_{x}": f"{name}.{x}_norm" for name in attentions.split() for x in "qk"}
    return {" ".join(same): "=", **norms}


def _ada(names: str) -> str:
    return " ".join(
        f"{name}.{layer}"
        for name in names.split()
        for layer in ("linear", "emb.timestep_embedder.linear_1", "emb.timestep_embedder.linear_2")
    )


def _ltx(ada: dict[str, str], prefixes: tuple[str, ...], attentions: str, feedforwards: str) -> tuple[str, Naming]:
    """Canonical names of the layers outside of blocks, and diffusers' names of all layers."""
    same = ("caption_projection.linear_1", "caption_projection.linear_2", "proj_out", "scale_shift_table")
    top = {
        **{f"{prefix}proj_in": f"{prefix}patchify_proj" for prefix in prefixes},
        " ".join(f"{prefix}{name}" for prefix in prefixes for name in same): "=",
    }
    for theirs, ours in ada.items():
        top |= dict(zip(_ada(theirs).split(), _ada(ours).split(), strict=True))
    block = {**_ltx_block(attentions, feedforwards), " ".join(f"{p}scale_shift_table" for p in prefixes): "="}
    canonical = " ".join(name if target == "=" else target for name, target in top.items())
    return canonical, {"transformer_blocks.#": ("transformer_blocks.#", block), "": ("", top)}


_LTX_DIALECTS = (
    dialect("diffusion_model.", readers="comfy"),
    dialect("lora_unet_", readers="comfy kohya"),
    dialect("transformer.", "diffusers", readers="diffusers"),
    dialect("", readers="comfy"),
    dialect("transformer."),
)
_LTX_TOP, _LTX = _ltx({"time_embed": "adaln_single"}, ("",), "attn1 attn2", "ff")
LTX_VIDEO = Family(
    "ltx_video",
    Component(
        "diffusion_model.",
        {
            "transformer_blocks.#": f"{_attentions('attn1 attn2')} ff.net.0.proj ff.net.2 scale_shift_table",
            "": _LTX_TOP,
        },
        _LTX_DIALECTS,
        {"diffusers": _LTX},
    ),
    (t5(),),
    hints=("ltxv", "ltx-video"),
)
_LTX2_ATTENTIONS = "attn1 attn2 audio_attn1 audio_attn2 audio_to_video_attn video_to_audio_attn"
_LTX2_TOP, _LTX2 = _ltx(
    {
        "time_embed": "adaln_single",
        "audio_time_embed": "audio_adaln_single",
        "av_cross_attn_video_scale_shift": "av_ca_video_scale_shift_adaln_single",
        "av_cross_attn_audio_scale_shift": "av_ca_audio_scale_shift_adaln_single",
        "av_cross_attn_video_a2v_gate": "av_ca_a2v_gate_adaln_single",
        "av_cross_attn_audio_v2a_gate": "av_ca_v2a_gate_adaln_single",
    },
    ("", "audio_"),
    _LTX2_ATTENTIONS,
    "ff audio_ff",
)
_LTX2_BLOCK = {
    **_LTX2["transformer_blocks.#"][1],
    "video_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_video",
    "audio_a2v_cross_attn_scale_shift_table": "scale_shift_table_a2v_ca_audio",
}
_CONNECTORS = " ".join(f"{x}_embeddings_connector.transformer_1d_blocks.#" for x in ("audio", "video"))
LTX2 = Family(
    "ltx2",
    Component(
        "diffusion_model.",
        {
            "transformer_blocks.#": f"{_attentions(_LTX2_ATTENTIONS)} ff.net.0.proj ff.net.2 audio_ff.net.0.proj "
            "audio_ff.net.2 scale_shift_table audio_scale_shift_table scale_shift_table_a2v_ca_video "
            "scale_shift_table_a2v_ca_audio",
            **{block: f"{_attentions('attn1')} ff.net.0.proj ff.net.2" for block in _CONNECTORS.split()},
            "": _LTX2_TOP,
        },
        _LTX_DIALECTS,
        {"diffusers": {**_LTX2, "transformer_blocks.#": ("transformer_blocks.#", _LTX2_BLOCK)}},
    ),
    (llama("gemma3_12b"),),
    hints=("ltx2", "ltx-2"),
)

_COSMOS_BLOCK = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.output_proj self_attn.q_norm self_attn.k_norm "
    "cross_attn.q_proj cross_attn.k_proj cross_attn.v_proj cross_attn.output_proj cross_attn.q_norm cross_attn.k_norm "
    "mlp.layer1 mlp.layer2 adaln_modulation_self_attn.1 adaln_modulation_self_attn.2 adaln_modulation_cross_attn.1 "
    "adaln_modulation_cross_attn.2 adaln_modulation_mlp.1 adaln_modulation_mlp.2"
)
_COSMOS_TOP = (
    "x_embedder.proj.1 t_embedder.1.linear_1 t_embedder.1.linear_2 t_embedding_norm final_layer.linear "
    "final_layer.adaln_modulation.1 final_layer.adaln_modulation.2"
)
_COSMOS_NAMES = {
    **{
        f"{theirs}.{name}": f"{ours}.{target}"
        for theirs, ours in (("attn1", "self_attn"), ("attn2", "cross_attn"))
        for name, target in (
            ("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out.0", "output_proj"),
            ("norm_q", "q_norm"), ("norm_k", "k_norm"),
        )
    },
    "ff.net.0.proj": "mlp.layer1",
    "ff.net.2": "mlp.layer2",
    **{
        f"norm{i + 1}.linear_{j}": f"adaln_modulation_{name}.{j}"
        for i, name in enumerate(("self_attn", "cross_attn", "mlp"))
        for j in (1, 2)
    },
}  # fmt: skip
_COSMOS_OUTER = {
    "patch_embed.proj": "x_embedder.proj.1",
    "time_embed.t_embedder.linear_1": "t_embedder.1.linear_1",
    "time_embed.t_embedder.linear_2": "t_embedder.1.linear_2",
    "time_embed.norm": "t_embedding_norm",
    "proj_out": "final_layer.linear",
    "norm_out.linear_1": "final_layer.adaln_modulation.1",
    "norm_out.linear_2": "final_layer.adaln_modulation.2",
}
_COSMOS: Naming = {"transformer_blocks.#": ("blocks.#", _COSMOS_NAMES), "": ("", _COSMOS_OUTER)}
COSMOS = Family(
    "cosmos",
    Component(
        "diffusion_model.",
        {"blocks.#": _COSMOS_BLOCK, "": _COSMOS_TOP},
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("transformer.", "diffusers", readers="diffusers"),
            dialect(""),
        ),
        {"diffusers": _COSMOS},
    ),
    (t5(),),
    hints=("cosmos",),
)
# Cosmos Predict 2 with a transformer that adapts the text
_LLM_ADAPTER = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm "
    "cross_attn.q_proj cross_attn.k_proj cross_attn.v_proj cross_attn.o_proj cross_attn.q_norm cross_attn.k_norm "
    "mlp.0 mlp.2 norm_self_attn norm_cross_attn norm_mlp"
)
_ANIMA: Naming = {
    "transformer.transformer_blocks.#": ("blocks.#", _COSMOS_NAMES),
    "transformer": ("", _COSMOS_OUTER),
    "text_conditioner.blocks.#": ("llm_adapter.blocks.#", {_LLM_ADAPTER: "="}),
    "text_conditioner": ("llm_adapter", {"embed out_proj norm": "="}),
}
ANIMA = Family(
    "anima",
    Component(
        "diffusion_model.",
        {
            "blocks.#": _COSMOS_BLOCK,
            "llm_adapter.blocks.#": _LLM_ADAPTER,
            "llm_adapter": "embed out_proj norm",
            "": _COSMOS_TOP,
        },
        (
            dialect("diffusion_model.", readers="comfy"),
            dialect("lora_unet_", readers="comfy kohya"),
            dialect("", "diffusers", readers="diffusers"),
            dialect(""),
        ),
        {"diffusers": _ANIMA},
    ),
    (llama("qwen3_06b", single=True),),
    hints=("anima",),
)
