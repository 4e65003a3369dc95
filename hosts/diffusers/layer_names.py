"""diffusers' names for the layers of a LoRA, derived from diffusers' own loaders.

This module chooses the loader of the base model and the spelling that the loader expects; `probing` derives the
key map. Where the loaders are incomplete, names come from a model or from the converter of checkpoints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from diffusers.loaders import lora_pipeline, single_file_utils
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from diffusers.utils.state_dict_utils import convert_state_dict_to_kohya
from torch import Tensor

from ...core.adapter import Adapter
from ...core.errors import MergeError, name_some
from ...core.formats import FORMATS
from ...core.layers.keymap import KeyMap, MappedRows, apply_key_map
from .probing import Converter, Probe, RowCounts, complete_modules, probe_converter

_IS_DIFFUSERS = FORMATS["diffusers"].is_native_name
_IS_KOHYA = FORMATS["kohya"].is_native_name


def key_map(adapters: Sequence[Adapter]) -> KeyMap:
    """The key map from the adapters' module names to diffusers' names.

    Modules that diffusers cannot convert, or only by changing their values, are not in the map (see
    `core.layers.keymap.unmapped_modules`) and keep their names.

    Args:
        adapters: LoRAs of one base model, in any dialects.
    """
    mapped: dict[str, tuple[MappedRows, ...]] = {}
    for adapter in adapters:
        rows = _row_counts(adapter)
        mapped.update({name: (MappedRows(target),) for name in rows if (target := _native_name(name)) is not None})
        rest = {name: count for name, count in rows.items() if name not in mapped}
        text = {name: count for name, count in rest.items() if _TEXT_ENCODER.match(name)}
        model = {name: count for name, count in rest.items() if name not in text}
        mapped.update(
            probe_converter(text, _loader("StableDiffusionXLLoraLoaderMixin"), _spell_text_encoder, _IS_DIFFUSERS)
        )
        architecture = _architecture(adapter)
        if architecture == "sd3":
            mapped.update(_sd3_key_map(model, adapter))
        elif architecture == "flux-onetrainer":
            mapped.update(_onetrainer_flux_key_map(model))
        elif architecture is not None:
            loader, spell = _LOADERS[architecture]
            mapped.update(probe_converter(model, _loader(loader), spell, _IS_DIFFUSERS))
    return mapped


def to_diffusers(adapter: Adapter) -> Adapter:
    """The adapter under diffusers' names, ready to be saved in that format.

    Raises:
        MergeError: diffusers has no name for a layer.
    """
    mapped = key_map([adapter])
    unnamed = sorted(set(adapter.modules) - set(mapped))
    if unnamed:
        raise MergeError(
            "diffusers has no names for some layers.",
            file=adapter.source.path or None,
            found=name_some(unnamed, 3),
            remedy="keep the format of the inputs, or save as comfy",
        )
    return apply_key_map(adapter, mapped)


def to_kohya(adapter: Adapter) -> Adapter:
    """The adapter under kohya's names, ready to be saved in that format. Stable Diffusion's U-Nets only.

    Raises:
        MergeError: Another architecture, whose kohya names fuse layers or are unknown.
    """
    if not all(_IS_KOHYA(name) for name in adapter.modules):
        adapter = to_diffusers(adapter)
    rows = {name: count for name, count in _row_counts(adapter).items() if "." in name}
    foreign = [name for name in rows if not name.startswith(("unet.", "text_encoder.", "text_encoder_2."))]
    if foreign:
        raise MergeError(
            "kohya names are known for Stable Diffusion 1, 2 and XL only.",
            file=adapter.source.path or None,
            found=name_some(foreign, 3),
            remedy="save as comfy or diffusers",
        )
    if not any(name.startswith("text_encoder_2.") or _is_sdxl_layer(name, adapter) for name in rows):
        prefix = "lora_te"  # a single text encoder has no number
    else:
        prefix = "lora_te1"
    mapped = probe_converter(rows, convert_state_dict_to_kohya, lambda name: name, _IS_KOHYA)
    return apply_key_map(
        adapter,
        {
            name: tuple(MappedRows(re.sub("^lora_te1(?=_)", prefix, part.target), part.rows) for part in parts)
            for name, parts in mapped.items()
        },
    )


def _is_sdxl_layer(name: str, adapter: Adapter) -> bool:
    return name.endswith("attn2.to_k") and name in adapter.modules and adapter.modules[name].d_in == 2048


def _row_counts(adapter: Adapter) -> dict[str, int]:
    rows = {name.rpartition(".")[0]: tensor.shape[0] for name, tensor in adapter.diffs.items() if tensor.ndim == 1}
    return {**rows, **{name: part.d_out for name, part in adapter.modules.items()}}


# --- loader and spelling by architecture ------------------------------------------------------------------------------

_TEXT_ENCODER = re.compile(r"lora_te\d?_text_(model|projection)|text_encoders\.clip_[lg]\.transformer\.text_")
_UNET_ROOTS = ("down_blocks.", "mid_block.", "up_blocks.", "conv_in.", "time_embedding.", "add_embedding.")
_DIT_ROOTS = ("transformer_blocks.", "single_transformer_blocks.")


def _native_name(name: str) -> str | None:
    """The full name of a module in diffusers' dialect; ``None`` if it is in another dialect."""
    if name.startswith("transformer.") and re.match(r"transformer\.(double|single|joint)_blocks\.", name):
        return None
    if _IS_DIFFUSERS(name):
        return name
    if name.startswith(_UNET_ROOTS):
        return f"unet.{name}"
    if name.startswith(_DIT_ROOTS):
        return f"transformer.{name}"
    return None


def _architecture(adapter: Adapter) -> str | None:
    """The family of the base model, by names and, where two families share names, by shapes."""
    flat = {name.replace(".", "_"): part for name, part in adapter.modules.items()}
    text = " ".join(flat)

    def ratio(suffix: str) -> float:
        """``d_out / d_in`` of the first module whose name ends so."""
        return next((part.d_out / part.d_in for name, part in flat.items() if name.endswith(suffix)), 0.0)

    if "joint_blocks_" in text:
        return "sd3"
    if "double_blocks_" in text or "single_blocks_" in text:
        if re.search(r"img_mlp_fc|img_mod_linear|token_refiner|double_blocks_19_|single_blocks_3[89]_", text):
            return "hunyuan"
        if ratio("_linear1") == 9 or ratio("img_mlp_0") == 6 or "stream_modulation" in text:
            return "flux2"
        return "flux"
    if "lora_transformer_" in text:
        return "flux-onetrainer"
    if re.search(r"(^|_| )blocks_\d+_(self_attn|cross_attn|ffn)", text):
        return "wan"
    if re.search(r"layers_\d+_(attention|feed_forward|adaLN)", text):
        return "lumina2" if ratio("attention_qkv") == 3840 / 2304 else "z-image"
    if "transformer_blocks_" in text and re.search(r"(input|output|down|up|middle|mid)_blocks?_", text) is None:
        return "ltx" if "attn1" in text else "qwen"
    if re.search(r"(input|output|down|up)_blocks_|mid(dle)?_block_", text):
        return "unet"
    return None


def _without_prefix(name: str) -> str:
    """A dotted or underscored native name without the prefix of its dialect."""
    for prefix in ("diffusion_model.", "transformer.", "unet.", "lora_unet__", "lora_unet_"):
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _spell_kohya(name: str) -> str:
    return name if ".processor." in name else "lora_unet_" + _without_prefix(name).replace(".", "_")


def _spell_dotted(name: str) -> str:
    return name if name.startswith("lora_") else "diffusion_model." + _without_prefix(name)


def _spell_wan(name: str) -> str:
    path = re.sub(r"^blocks_(\d+)_", r"blocks.\1.", _without_prefix(name))
    path = re.sub(r"(?<=\.)(self_attn|cross_attn)_", r"\1.", path)
    return "diffusion_model." + re.sub(r"(?<=\.)ffn_(?=\d)", "ffn.", path)


def _spell_text_encoder(name: str) -> str:
    for prefix, number in (("text_encoders.clip_l.transformer.", "1"), ("text_encoders.clip_g.transformer.", "2")):
        if name.startswith(prefix):
            return f"lora_te{number}_" + name.removeprefix(prefix).replace(".", "_")
    return name


_LOADERS: dict[str, tuple[str, Callable[[str], str]]] = {
    "unet": ("StableDiffusionXLLoraLoaderMixin", _spell_kohya),
    "flux": ("FluxLoraLoaderMixin", _spell_kohya),
    "flux2": ("Flux2LoraLoaderMixin", _spell_dotted),
    "hunyuan": ("HunyuanVideoLoraLoaderMixin", _without_prefix),
    "wan": ("WanLoraLoaderMixin", _spell_wan),
    "qwen": ("QwenImageLoraLoaderMixin", _spell_dotted),
    "z-image": ("ZImageLoraLoaderMixin", _spell_dotted),
    "lumina2": ("Lumina2LoraLoaderMixin", _spell_dotted),
    "ltx": ("LTXVideoLoraLoaderMixin", _spell_dotted),
}
_UNET_CONFIG = SimpleNamespace(layers_per_block=2)  # that of all of Stability's U-Nets


def _loader(name: str) -> Converter:
    """The conversion of state dicts by a loader of diffusers."""

    def converter(state: dict[str, Tensor]) -> dict[str, Tensor]:
        # a loader that this diffusers does not have yet fails here, like one that refuses the file
        mixin: Any = getattr(lora_pipeline, name)
        result: Any = mixin.lora_state_dict(state, unet_config=_UNET_CONFIG)
        return result[0] if isinstance(result, tuple) else result

    return converter


# --- names from models and checkpoints, where the loaders are incomplete ----------------------------------------------


def _onetrainer_flux_key_map(rows: RowCounts) -> dict[str, tuple[MappedRows, ...]]:
    """The key map of OneTrainer's Flux names: diffusers' own with underscores, of which the loader knows only some."""
    with torch.device("meta"):
        model = FluxTransformer2DModel(guidance_embeds=True)
    paths = {f"lora_transformer_{path.replace('.', '_')}": path for path, _ in model.named_modules()}
    return {name: (MappedRows(f"transformer.{paths[name]}"),) for name in rows if name in paths}


class _RecordingCheckpoint(dict[str, Tensor]):
    """A checkpoint that has any key, and records the keys that the converter pops."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__(tensors)
        self.popped: list[str] = []

    def __missing__(self, key: str) -> Tensor:
        return torch.zeros(6, 1, dtype=torch.float64)  # divisible by two and three: the converter may split it

    def pop(self, key: str, *default: Any) -> Tensor:
        self.popped.append(key)
        return super().pop(key, self[key])


def _sd3_key_map(rows: RowCounts, adapter: Adapter) -> dict[str, tuple[MappedRows, ...]]:
    """The key map of native SD3 names, by the checkpoint converter run on a probe."""
    flat = {_without_prefix(name).replace(".", "_"): name for name in rows}
    # the converter treats the last block differently, so the number of blocks matters: SD3 has one per 64 channels
    hidden = next((p.d_in for n, p in adapter.modules.items() if re.search(r"(attn.qkv|mlp.fc1)$", n)), 0)
    highest = max(int(match[1]) for name in flat if (match := re.search(r"joint_blocks_(\d+)_", name)))
    depth = max(hidden // 64, highest + 1)
    blocks = [f"joint_blocks.{i}.x_block.attn.qkv.weight" for i in range(depth)]
    blocks += [f"joint_blocks.{m[1]}.x_block.attn2.qkv.weight" for n in flat if (m := re.search(r"_(\d+)_.*attn2_", n))]
    filler = torch.zeros(6, 1, dtype=torch.float64)
    dry_run = _RecordingCheckpoint(dict.fromkeys(blocks, filler))
    single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(dry_run)
    native = {key.removesuffix(".weight").replace(".", "_"): key for key in dry_run.popped if key.endswith(".weight")}
    convertible = {name: count for name, count in rows.items() if _without_prefix(name).replace(".", "_") in native}
    probe = Probe.of(convertible)
    checkpoint = _RecordingCheckpoint(dict.fromkeys(blocks, filler))
    for index, name in enumerate(probe.names):
        checkpoint[native[_without_prefix(name).replace(".", "_")]] = probe.up(index)
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    targets = {
        f"transformer.{key.removesuffix('.weight')}": decoded
        for key, tensor in converted.items()
        if key.endswith(".weight") and (decoded := probe.decode(tensor)) is not None
    }
    return complete_modules(probe, convertible, targets)
