"""PEFT: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``, which holds the scale."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import FormatError, SaveError, name_some
from ..lowrank import LowRank
from . import reading, writing
from .base_weights import BaseWeights
from .peft_config import PREFIX, PeftScale, lora_config, parse_config
from .peft_experts import (
    StackedUpdate,
    equalise_ranks,
    parameter_of,
    parameter_ranks,
    split_experts,
    stack_experts,
    stacked_parameters,
    wrapper_names,
)
from .peft_folder import CONFIG
from .suffixes import classify, role_of

# settings of initialisation and training; PEFT warns where they are set without effect
_TRAINING_SETTINGS = ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config", "runtime_config")
_PARAMETER = re.compile(r"(.+)\.(weight|bias)")
# names of parameters of wrapped layers in a running PEFT model
_WRAPPED = re.compile(r"(.+)\.(?:base_layer|modules_to_save\.default)\.(weight|bias)")


class Peft:
    """Written by PEFT. Reading removes the wrapper's prefix ``base_model.model.``, writing adds it again."""

    name = "peft"

    def matches(self, keys: Collection[str]) -> bool:
        return any(key.startswith(PREFIX) for key in keys)

    def is_native_name(self, module: str) -> bool:
        return not module.startswith(("lora_unet_", "lora_te", "lycoris_", "diffusion_model.", "text_encoders."))

    def can_store_name(self, module: str) -> bool:
        return self.is_native_name(module)

    def read(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        source: Source,
        convert_rank: int | None,
        base: BaseWeights | None = None,
    ) -> Adapter:
        """A single file without a configuration has scale 1, as in programs for image models."""
        unprefixed = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        alpha_of = None
        if CONFIG_KEY in metadata:
            config = parse_config(metadata[CONFIG_KEY], source)
            scale = PeftScale.from_config(config, source, allow_dora=base is not None)
            if config["peft_type"].upper() == "LORA":
                unprefixed = _split_parameters(unprefixed, config, scale, source)
                alpha_of = _alpha_lookup(scale)
            else:
                unprefixed = _fold_scales(unprefixed, scale)
                metadata = {**metadata, CONFIG_KEY: json.dumps(lora_config(config), sort_keys=True)}
        adapter = reading.assemble(
            unprefixed, metadata, source, convert_rank=convert_rank, alpha_of=alpha_of, base=base
        )
        originals = {key.removeprefix(PREFIX): key for key in tensors}
        extras = {_unwrapped_key(originals[key], tensors): tensor for key, tensor in adapter.extras.items()}
        return replace(adapter, extras=extras)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        writing.check_names(adapter, self.name, self.is_native_name, "model.layers.0.self_attn.q_proj")
        adapter = replace(adapter, modules=equalise_ranks(adapter.modules))
        modules, parameters = stack_experts(adapter.modules)
        state: dict[str, Tensor] = {}
        for name, wrapper in wrapper_names(parameters).items():
            state[f"{PREFIX}{wrapper}.lora_A.weight"] = parameters[name].A
            state[f"{PREFIX}{wrapper}.lora_B.weight"] = parameters[name].B
        for name, part in modules.items():
            down, up = writing.unflatten(part)
            if name.endswith(".lora_embedding"):
                state[f"{PREFIX}{name}_A"], state[f"{PREFIX}{name}_B"] = down, up
            else:
                state[f"{PREFIX}{name}.lora_A.weight"], state[f"{PREFIX}{name}.lora_B.weight"] = down, up
        biases = writing.lora_B_biases(adapter, self.name)
        without = [name for name in biases if name.endswith(".lora_embedding") or parameter_of(name)]
        if without:
            raise SaveError(
                "PEFT loads biases for all layers or none, and has none for embeddings and stacked experts.",
                found=f"biases beside {name_some(without, 3)}",
                remedy="keep these out of the merge: give them the module weight 0",
            )
        for name, bias in biases.items():
            part = modules[name]
            state[f"{PREFIX}{name}.lora_B.bias"] = bias if part.scale == 1.0 else _unscaled(bias, part.scale)
        metadata = {"format": "pt", **writing.string_metadata(adapter.metadata, CONFIG_KEY)}
        return writing.add_extras(state, replace(adapter, extras=self._wrapped_extras(adapter))), metadata

    def _wrapped_extras(self, adapter: Adapter) -> dict[str, Tensor]:
        """The extras under the keys where PEFT looks for them: layers with a LoRA are wrapped.

        Raises:
            SaveError: A layer that is saved whole has a LoRA too, which PEFT would ignore silently.
        """
        layers = {name.removesuffix(".lora_embedding") for name in adapter.modules}
        saved = _saved_modules(_input_config(adapter), adapter)
        both = [layer for layer in layers if any(_contains(module, f"{layer}.weight") for module in saved)]
        if both:
            raise SaveError(
                "One LoRA replaces a layer as a whole, another adds a LoRA to it: PEFT has no place for both.",
                module=name_some(sorted(both), 3),
                found=f"modules_to_save {name_some(saved, 3)}",
                remedy=f"leave the latter out there: --module-weight '*{min(both)}*=0'",
            )
        extras: dict[str, Tensor] = {}
        for key, tensor in adapter.extras.items():
            match = _PARAMETER.fullmatch(key.removeprefix(PREFIX))
            wrapped = match is not None and match[1] in layers
            extras[f"{PREFIX}{match[1]}.base_layer.{match[2]}" if match and wrapped else key] = tensor
        return extras

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """The adapter's ``adapter_config.json``: entries of its input, its own ranks, alphas and targets."""
        config = _input_config(adapter)
        if not any(".token_adapter." in key for key in adapter.extras):
            config.pop("trainable_token_indices", None)
        modules, parameters = stack_experts(equalise_ranks(adapter.modules))
        layers = {name.removesuffix(".lora_embedding"): part for name, part in modules.items()}
        ranks = {name: part.rank for name, part in {**layers, **parameters}.items()}
        alphas = {name: _alpha(part) for name, part in {**layers, **parameters}.items()}
        r, lora_alpha = _most_common(ranks.values()), _most_common(alphas.values())
        # without ^ a name would also match all layers whose names end with it
        rank_pattern = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
        alpha_pattern = {f"^{re.escape(name)}": alpha for name, alpha in alphas.items() if alpha != lora_alpha}
        for pattern, (rank, alpha) in parameter_ranks(modules, r, lora_alpha).items():
            rank_pattern[pattern], alpha_pattern[pattern] = rank, _number(alpha)
        return {
            "fan_in_fan_out": False,
            **{key: value for key, value in config.items() if key not in _TRAINING_SETTINGS},
            "bias": config.get("bias", "none") if any(key.endswith(".bias") for key in adapter.extras) else "none",
            "modules_to_save": _saved_modules(config, adapter) or None,
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": lora_alpha,
            "use_rslora": False,
            "use_dora": False,
            "rank_pattern": rank_pattern,
            "alpha_pattern": alpha_pattern,
            "target_modules": sorted(layers),
            "target_parameters": sorted(parameters) or None,
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "lora_bias": bool(adapter.diffs),
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _input_config(adapter: Adapter) -> dict[str, Any]:
    """The configuration in the adapter's metadata, ``{}`` without one."""
    text = adapter.metadata.get(CONFIG_KEY)
    return {} if text is None else parse_config(text, adapter.source)


def _unwrapped_key(key: str, all_keys: Collection[str]) -> str:
    """The key of an extra as in a model without PEFT, unless the file has that key too."""
    match = _WRAPPED.fullmatch(key)
    unwrapped = key if match is None else f"{match[1]}.{match[2]}"
    return key if unwrapped in all_keys else unwrapped


def _saved_modules(config: Mapping[str, Any], adapter: Adapter) -> list[str]:
    """The entries of ``modules_to_save`` that match extras of the adapter."""
    keys = [key.removeprefix(PREFIX) for key in adapter.extras]
    return [name for name in config.get("modules_to_save") or () if any(_contains(name, key) for key in keys)]


def _contains(module: str, key: str) -> bool:
    """Whether a parameter belongs to a module that an entry of ``modules_to_save`` matches."""
    return re.match(rf"(.*\.)?{re.escape(module)}\.", key) is not None


def _fold_scales(tensors: Mapping[str, Tensor], scale: PeftScale) -> dict[str, Tensor]:
    """Multiply the scale into one factor of each LoHa or LoKr; PEFT's is alpha / r, decomposed factors or not."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, role = role_of(key) or ("", "")
        first = role in ("hada_w1_a", "lokr_w1", "lokr_w1_a")
        result[key] = scale.alpha(module) / scale.rank(module) * tensor.float() if first else tensor
    return result


def _split_parameters(
    tensors: Mapping[str, Tensor], config: Mapping[str, Any], scale: PeftScale, source: Source
) -> dict[str, Tensor]:
    """The tensors with the factors of stacked experts under one module per expert, see `split_experts`.

    Raises:
        FormatError: Factors that do not fit the configuration.
    """
    targets = config.get("target_parameters") or []
    roles, _ = classify(tensors)
    result = dict(tensors)
    try:
        for parameter in stacked_parameters(roles, targets):
            keys = roles[parameter.wrapper]
            if {"down", "up"} - set(keys):
                continue  # reported by `assemble`
            A, B = result.pop(keys["down"]), result.pop(keys["up"])
            for name, (A_e, B_e) in split_experts(parameter.name, A, B, scale.rank(parameter.name)).items():
                result[f"{name}.lora_A.weight"], result[f"{name}.lora_B.weight"] = A_e, B_e
    except FormatError as error:
        raise error.at(source.path or None, error.module or CONFIG) from None
    return result


def _alpha_lookup(scale: PeftScale) -> reading.AlphaLookup:
    """The scales of a configuration, which names parameters where the engine has their experts."""
    return lambda module, rank: scale(parameter_of(module) or module, rank)


def _unscaled(bias: Tensor, scale: float) -> Tensor:
    # a scale of 0 also multiplies the bias of B, so no bias can be stored
    return bias if scale == 0.0 else (bias.float() / scale).to(bias.dtype)


def _alpha(part: LowRank | StackedUpdate) -> float | int:
    return _number(part.rank if part.alpha is None else part.alpha)


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else float(value)


def _most_common(values: Any) -> Any:
    """The most common value; the smallest of several equally common ones."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
