"""Text encoders: CLIP, T5, and language models of the Llama kind, under the names that ComfyUI gives to each."""

from __future__ import annotations

from .table import Component, Naming, dialect

_CLIP_LAYERS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.out_proj mlp.fc1 mlp.fc2 layer_norm1 layer_norm2"
)
_CLIP = {
    "text_model.encoder.layers.#": _CLIP_LAYERS,
    "text_model": "embeddings.token_embedding embeddings.position_embedding final_layer_norm",
    "": "text_projection",
}
_MATRICES = " ".join(_CLIP_LAYERS.split()[:6])
_CLIP_MATRICES: Naming = {"text_model.encoder.layers.#": ("text_model.encoder.layers.#", {_MATRICES: "="})}
_CLIP_PROJECTION: Naming = {**_CLIP_MATRICES, "": ("", {"text_projection": "="})}

_T5 = {
    "encoder.block.#": "layer.0.SelfAttention.q layer.0.SelfAttention.k layer.0.SelfAttention.v "
    "layer.0.SelfAttention.o layer.0.layer_norm layer.1.DenseReluDense.wi layer.1.DenseReluDense.wi_0 "
    "layer.1.DenseReluDense.wi_1 layer.1.DenseReluDense.wo layer.1.layer_norm",
    "encoder": "final_layer_norm",
    "": "shared",
}
_LLAMA_LAYERS = (
    "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj self_attn.q_norm self_attn.k_norm "
    "mlp.gate_proj mlp.up_proj mlp.down_proj input_layernorm post_attention_layernorm"
)
_LLAMA = {"model.layers.#": _LLAMA_LAYERS, "model": "embed_tokens norm"}
# kohya's names begin within the language model
_LLAMA_INNER: Naming = {"layers.#": ("model.layers.#", {_LLAMA_LAYERS: "="}), "": ("model", {"embed_tokens norm": "="})}


def clip(name: str, *, kohya: str = "", diffusers: str = "", others: tuple[str, ...] = ()) -> Component:
    """A CLIP text encoder.

    Args:
        name: ComfyUI's name, ``clip_l``, ``clip_g`` or ``clip_h``.
        kohya: Prefix of underscored names.
        diffusers: Prefix of diffusers' names.
        others: Further prefixes, which are read only.
    """
    root = f"text_encoders.{name}.transformer."
    return Component(
        root,
        _CLIP,
        (
            # the projection is trained with two encoders only
            *([dialect(kohya, _kohya_naming(kohya), readers="comfy kohya")] if kohya else []),
            dialect(root, readers="comfy"),
            *([dialect(diffusers, "matrices", readers="comfy diffusers")] if diffusers else []),
            *(dialect(prefix) for prefix in others),
        ),
        {"matrices": _CLIP_MATRICES, "projection": _CLIP_PROJECTION},
    )


def _kohya_naming(prefix: str) -> str:
    return "matrices" if prefix == "lora_te_" else "projection"


def t5(name: str = "t5xxl", *, kohya: tuple[str, ...] = (), others: tuple[str, ...] = ()) -> Component:
    """A T5 text encoder; `kohya` are prefixes of underscored names that ComfyUI reads, see `clip` for the others."""
    root = f"text_encoders.{name}.transformer."
    return Component(
        root,
        _T5,
        (
            dialect(root, readers="comfy"),
            dialect("text_encoders.transformer.", readers="comfy"),
            *(dialect(prefix, readers="comfy kohya") for prefix in kohya),
            *(dialect(prefix) for prefix in others),
        ),
    )


def llama(name: str, *, single: bool = False) -> Component:
    """A language model as text encoder; `single`: it is the only one, so that names with ``lora_te_`` mean it."""
    root = f"text_encoders.{name}.transformer."
    return Component(
        root,
        _LLAMA,
        (
            dialect(root, readers="comfy"),
            *([dialect("text_encoders.transformer.", readers="comfy")] if single else []),
            *([dialect("lora_te_", "inner", readers="comfy kohya")] if single else []),
        ),
        {"inner": _LLAMA_INNER},
    )
