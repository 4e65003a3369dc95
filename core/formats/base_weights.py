"""Weights of a base model, by the names that LoRA files give its layers: for updates that depend on the weights.

Reads safetensors only: a checkpoint, or a folder of a diffusers pipeline or a transformers model.
"""

from __future__ import annotations

import math
from functools import cached_property
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from ..adapter import is_text_encoder
from ..errors import FormatError, name_some
from . import hashes
from .files import read_header

# What stands before the path of a layer: in LoRA files, and in checkpoints.
_MODULE_PREFIXES = (
    *("lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_", "lora_te1_", "lora_te2_", "lora_te3_", "lora_te_"),
    *("diffusion_model.", "unet.", "transformer.", "prior.", "text_encoder_2.", "text_encoder_3.", "text_encoder."),
    "base_model.model.",
)
_CHECKPOINT_PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "cond_stage_model.transformer.",
    "conditioner.embedders.0.transformer.",
)
_VARIANTS = (".fp16", ".bf16", ".non_ema")  # ends of diffusers' names of files
_MAX_SHOWN = 3


class BaseWeights:
    """The weights of a base model; its files are opened at the first use.

    Args:
        path: A safetensors file, or a folder that holds some, at any depth of two.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used = False  # whether an adapter needed a weight

    @cached_property
    def _layers(self) -> dict[str, list[tuple[str, Path, str, tuple[int, ...]]]]:
        """Flattened name of a layer -> (component of the pipeline, file, key, shape).

        Raises:
            FormatError: There is no such file, or it is not a safetensors file.
        """
        path = self.path
        layers: dict[str, list[tuple[str, Path, str, tuple[int, ...]]]] = {}
        files = [path] if not path.is_dir() else sorted([*path.glob("*.safetensors"), *path.glob("*/*.safetensors")])
        if not files:
            raise FormatError(
                "The folder of the base model holds no weights.",
                file=path,
                expected="safetensors files, or folders such as unet, transformer, text_encoder with some",
            )
        plain = {file for file in files if not file.stem.endswith(_VARIANTS)}
        for file in files:
            if file not in plain and any(other.parent == file.parent for other in plain):
                continue  # the same weights a second time
            component = "" if file.parent == path or not path.is_dir() else file.parent.name
            for key, shape in read_header(file).shapes.items():
                if key.endswith(".weight"):
                    entry = (component, file, key, shape)
                    layers.setdefault(_flatten(key.removesuffix(".weight")), []).append(entry)
        return layers

    def fingerprint(self) -> str:
        """Hash of the sizes and of parts of the files, see `hashes.fingerprint`."""
        return hashes.fingerprint(*sorted({entry[1] for entries in self._layers.values() for entry in entries}))

    def weight(self, module: str, d_out: int, d_in: int) -> Tensor:
        """The weight of a layer in float64, flattened to ``(d_out, d_in)``.

        Args:
            module: Name of the layer in a LoRA file.
            d_out, d_in: Shape of the update.

        Raises:
            FormatError: There are no such files, or the model has no such layer, several, one of another shape, or a
                quantised one.
        """
        self.used = True
        found = [
            entry for entry in self._candidates(module) if entry[3][:1] == (d_out,) and math.prod(entry[3][1:]) == d_in
        ]
        if len(found) != 1:
            others = [f"{key} {shape}" for _, _, key, shape in self._candidates(module)]
            raise FormatError(
                "The base model has no weight for a layer of the LoRA."
                if not found
                else "The base model has several weights for a layer of the LoRA.",
                file=self.path,
                module=module,
                expected=f"one weight of shape ({d_out}, {d_in}), named as in the LoRA",
                found=name_some(others, _MAX_SHOWN) or f"names such as {name_some(sorted(self._layers), _MAX_SHOWN)}",
                remedy="give the base model in the layout the LoRA was trained on: a checkpoint for kohya's and "
                "ComfyUI's names, a diffusers folder for diffusers' names",
            )
        _, file, key, _ = found[0]
        with safe_open(str(file), framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        if tensor.dtype.itemsize < 2 or not tensor.is_floating_point():
            raise FormatError(
                "The base model is quantised.",
                file=file,
                module=key,
                expected="weights in float16, bfloat16 or float32",
                found=tensor.dtype,
                remedy="give the base model in the precision the LoRA was trained on",
            )
        return tensor.double().flatten(1)

    def _candidates(self, module: str) -> list[tuple[str, Path, str, tuple[int, ...]]]:
        module = module.removesuffix(".lora_embedding")
        prefix = next((prefix for prefix in _MODULE_PREFIXES if module.startswith(prefix)), "")
        flat = dict.fromkeys((_flatten(module), _flatten(module.removeprefix(prefix))))
        entries = [entry for name in flat for entry in self._layers.get(name, ())]
        text = is_text_encoder(module)
        number = next((n for n in "23" if f"te{n}_" in prefix or f"encoder_{n}." in prefix), "")
        wanted = f"text_encoder_{number}" if number else "text_encoder"
        # a file without components may hold both networks: the paths tell them apart
        return [e for e in entries if not e[0] or (e[0] == wanted if text else not e[0].startswith("text_encoder"))]


def _flatten(name: str) -> str:
    prefix = next((prefix for prefix in _CHECKPOINT_PREFIXES if name.startswith(prefix)), "")
    return name.removeprefix(prefix).replace(".", "_")
