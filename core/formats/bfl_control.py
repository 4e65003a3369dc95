"""Black Forest Labs' control LoRAs (Canny, Depth): read as ComfyUI reads them.

Their ``img_in`` has more inputs than that of Flux, so the layer is widened (``reshape_weight``); scales of norms
replace those of the model (``set_weight``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch
from torch import Tensor

_PREFIX = "diffusion_model."


def is_bfl_control(keys: Collection[str]) -> bool:
    """Whether these are the keys of such a file; the same two keys decide in ComfyUI."""
    return "img_in.lora_A.weight" in keys and "single_blocks.0.norm.key_norm.scale" in keys


def comfy_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under ComfyUI's keys.

    Source: ComfyUI, ``comfy.lora_convert``.
    """
    result = {
        _PREFIX + (f"{key.removesuffix('.scale')}.set_weight" if key.endswith("_norm.scale") else key): tensor
        for key, tensor in tensors.items()
    }
    down, up = tensors["img_in.lora_A.weight"], tensors.get("img_in.lora_B.weight")
    if up is not None and up.ndim == down.ndim == 2:  # `assemble` reports other shapes
        result[f"{_PREFIX}img_in.reshape_weight"] = torch.tensor([up.shape[0], down.shape[1]])
    return result
