"""Tiny models of every family: the shapes of their weights, and what ComfyUI must know to name them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from legomole.core.layers.families import FAMILIES
from legomole.core.layers.families.table import Component, Family, canonical_templates

HIDDEN = 8  # width of the layers; SD 3 must have 64 per block
_NOT_A_MATRIX = re.compile(r"norm|scale_shift_table|modulation$|embedding$|(vision_in|img_emb).proj.[04]")
_NORM = re.compile(r"(query|key)_norm|[qk]_norm|norm_[qk]|norm3$|q_rms_norm|ln_q|attention_norm1")


@dataclass(frozen=True)
class ComfyModel:
    """A model of ComfyUI.

    Args:
        cls: Name of the class in ``comfy.model_base``.
        config: The ``unet_config`` that its key map reads.
        loader: Loader of diffusers, ``""`` if it has none.
    """

    cls: str
    config: Mapping[str, Any] = field(default_factory=dict[str, Any])
    loader: str = ""


_FLUX = {"depth": 2, "depth_single_blocks": 2, "hidden_size": HIDDEN}
_LUMINA = {"n_layers": 2, "dim": HIDDEN, "n_refiner_layers": 2}
_SDXL = {
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
}
_SD1 = {
    "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4],
    "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "transformer_depth_middle": 1,
}
MODELS: Mapping[str, ComfyModel] = {
    "sd1": ComfyModel("BaseModel", _SD1, "StableDiffusionXLLoraLoaderMixin"),
    "sd2": ComfyModel("BaseModel", _SD1, "StableDiffusionXLLoraLoaderMixin"),
    "sdxl": ComfyModel("SDXL", _SDXL, "StableDiffusionXLLoraLoaderMixin"),
    "sd3": ComfyModel("SD3", {"depth": 1, "num_blocks": 1}, "SD3LoraLoaderMixin"),
    "flux": ComfyModel("Flux", _FLUX, "FluxLoraLoaderMixin"),
    "chroma": ComfyModel("Chroma", _FLUX, "FluxLoraLoaderMixin"),
    "flux2": ComfyModel("Flux2", _FLUX, "Flux2LoraLoaderMixin"),
    "z_image": ComfyModel("Lumina2", _LUMINA, "ZImageLoraLoaderMixin"),
    "lumina2": ComfyModel("Lumina2", {"n_layers": 0, "n_refiner_layers": 0}, "Lumina2LoraLoaderMixin"),
    "qwen_image": ComfyModel("QwenImage", {}, "QwenImageLoraLoaderMixin"),
    "krea2": ComfyModel("Krea2", {"layers": 2}, "Krea2LoraLoaderMixin"),
    "hidream": ComfyModel("HiDream", {}, "HiDreamImageLoraLoaderMixin"),
    "pixart": ComfyModel("PixArt", {"depth": 2, "hidden_size": HIDDEN}),
    "wan": ComfyModel("WAN21", {}, "WanLoraLoaderMixin"),
    "ltx_video": ComfyModel("LTXV", {}, "LTXVideoLoraLoaderMixin"),
    "ltx2": ComfyModel("LTXAV", {}, "LTX2LoraLoaderMixin"),
    "hunyuan_video": ComfyModel("HunyuanVideo", {}, "HunyuanVideoLoraLoaderMixin"),
    "hunyuan_video15": ComfyModel("HunyuanVideo15", {}, "HunyuanVideoLoraLoaderMixin"),
    "cosmos": ComfyModel("CosmosPredict2", {}, "CosmosLoraLoaderMixin"),
    "anima": ComfyModel("Anima", {}, "AnimaLoraLoaderMixin"),
}
_ONE = ("sd1", "sd2", "sd3")  # the tiny models have one block of a kind
BY_NAME: Mapping[str, Family] = {family.name: family for family in FAMILIES}


def shapes(family: Family, *, norms: bool = False) -> dict[str, tuple[int, ...]]:
    """Canonical module name -> shape of its weight, for one or two blocks of every kind.

    Args:
        family: The family.
        norms: Norms instead of matrices.
    """
    result: dict[str, tuple[int, ...]] = {}
    for component in family.components:
        for template in canonical_templates(component):
            matrix = _NOT_A_MATRIX.search(template) is None
            if matrix == norms or (norms and _NORM.search(template) is None):
                continue
            for number in "01" if "#" in template and component is family.model and family.name not in _ONE else "0":
                path = template.replace("#", number)
                shape = _matrix(family, component, path)
                result[component.root + path] = (shape[0],) if norms else shape
    return result


def _matrix(family: Family, component: Component, path: str) -> tuple[int, int]:
    hidden = 64 if family.name == "sd3" and component is family.model else HIDDEN
    ratio = family.ratios.get(re.sub(r"(?<=_blocks\.)\d+|(?<=layers\.)\d+|(?<=refiner\.)\d+", "#", path))
    if ratio is not None and component is family.model:
        if family.name == "lumina2":
            return 5 * hidden, 3 * hidden
        return round(ratio * hidden), hidden
    if path.endswith("adaLN_modulation.1") and ("final" in path or "context_block" in path):
        return 2 * hidden, hidden
    shares = {
        sum(slot.part.shares) for naming in component.namings for slot in component.slots(naming, path)
    }  # all namings divide one weight alike, or not at all
    return max(shares | {1}) * hidden, 3 * hidden if family.name == "lumina2" else hidden
