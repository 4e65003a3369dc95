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
from ..errors import SaveError, name_some
from . import reading, writing
from .peft_config import PREFIX, PeftScale, as_lora, parse
from .suffixes import role_of

# said of how an adapter was initialised or run; PEFT warns of them where they are set for nothing
_OF_TRAINING = ("eva_config", "corda_config", "lora_ga_config", "loftq_config", "velora_config", "runtime_config")
_PARAMETER = re.compile(r"(.+)\.(weight|bias)")
# how a running PEFT model calls the parameters of layers it has wrapped
_WRAPPED = re.compile(r"(.+)\.(?:base_layer|modules_to_save\.default)\.(weight|bias)")


class Peft:
    """Written by PEFT. Names lose the wrapper's ``base_model.model.`` and get it back."""

    name = "peft"

    def matches(self, keys: Collection[str]) -> bool:
        return any(key.startswith(PREFIX) for key in keys)

    def fits(self, module: str) -> bool:
        return not module.startswith(("lora_unet_", "lora_te", "lycoris_", "diffusion_model.", "text_encoders."))

    def carries(self, module: str) -> bool:
        return self.fits(module)

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Source, convert_rank: int | None
    ) -> Adapter:
        """A lone file without a configuration has scale 1, as image programs read it."""
        named = {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items()}
        alpha_of = None
        if CONFIG_KEY in metadata:
            config = parse(metadata[CONFIG_KEY], source)
            scale = PeftScale.from_config(config, source)
            if config["peft_type"].upper() == "LORA":
                alpha_of = scale
            else:
                named = _scaled(named, scale)
                metadata = {**metadata, CONFIG_KEY: json.dumps(as_lora(config), sort_keys=True)}
        adapter = reading.assemble(named, metadata, source, convert_rank=convert_rank, alpha_of=alpha_of)
        originals = {key.removeprefix(PREFIX): key for key in tensors}
        extras = {_plain(originals[key], tensors): tensor for key, tensor in adapter.extras.items()}
        return Adapter(adapter.modules, adapter.diffs, extras, metadata, source)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        writing.demand_names(adapter, self.name, self.fits, "model.layers.0.self_attn.q_proj")
        state: dict[str, Tensor] = {}
        for name, part in adapter.modules.items():
            down, up = writing.factors(part)
            if name.endswith(".lora_embedding"):
                state[f"{PREFIX}{name}_A"], state[f"{PREFIX}{name}_B"] = down, up
            else:
                state[f"{PREFIX}{name}.lora_A.weight"], state[f"{PREFIX}{name}.lora_B.weight"] = down, up
        biases = writing.low_rank_bias(adapter, self.name)
        embeddings = [name for name in biases if name.endswith(".lora_embedding")]
        if embeddings:
            raise SaveError(
                "PEFT loads biases for all layers or none, and has none for embeddings.",
                found=f"biases beside {name_some(embeddings, 3)}",
                remedy="keep the embeddings out of the merge: give them the module weight 0",
            )
        for name, bias in biases.items():
            part = adapter.modules[name]
            state[f"{PREFIX}{name}.lora_B.bias"] = bias if part.scale == 1.0 else _unscaled(bias, part.scale)
        carried = replace(adapter, extras=self._placed(adapter))
        return writing.with_extras(state, carried), {"format": "pt", **writing.strings(adapter.metadata, CONFIG_KEY)}

    def _placed(self, adapter: Adapter) -> dict[str, Tensor]:
        """What is carried along, under the keys that PEFT looks for it: layers with a LoRA are wrapped.

        Raises:
            SaveError: A layer that is saved whole has a LoRA too: PEFT would leave that out without a word.
        """
        layers = {name.removesuffix(".lora_embedding") for name in adapter.modules}
        saved = _saved(_given(adapter), adapter)
        inside = [layer for layer in layers if any(_lies_in(module, f"{layer}.weight") for module in saved)]
        if inside:
            raise SaveError(
                "One LoRA replaces a layer as a whole, another adds a LoRA to it: PEFT has no place for both.",
                module=name_some(sorted(inside), 3),
                found=f"modules_to_save {name_some(saved, 3)}",
                remedy=f"leave the latter out there: --module-weight '*{min(inside)}*=0'",
            )
        extras: dict[str, Tensor] = {}
        for key, tensor in adapter.extras.items():
            match = _PARAMETER.fullmatch(key.removeprefix(PREFIX))
            wrapped = match is not None and match[1] in layers
            extras[f"{PREFIX}{match[1]}.base_layer.{match[2]}" if match and wrapped else key] = tensor
        return extras

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """The ``adapter_config.json`` of the adapter: what the inputs' said, but our own ranks, alphas and targets."""
        kept = _given(adapter)
        if not any(".token_adapter." in key for key in adapter.extras):
            kept.pop("trainable_token_indices", None)
        layers = {name.removesuffix(".lora_embedding"): part for name, part in adapter.modules.items()}
        r = _commonest(part.rank for part in layers.values())
        alphas = {name: _alpha(part) for name, part in layers.items()}
        lora_alpha = _commonest(alphas.values())
        return {
            "fan_in_fan_out": False,
            **{key: value for key, value in kept.items() if key not in _OF_TRAINING},
            "bias": kept.get("bias", "none") if any(key.endswith(".bias") for key in adapter.extras) else "none",
            "modules_to_save": _saved(kept, adapter) or None,
            "peft_type": "LORA",
            "r": r,
            "lora_alpha": lora_alpha,
            "use_rslora": False,
            "use_dora": False,
            # ^ and escapes: a bare name would also match every layer whose name ends with it
            "rank_pattern": {f"^{re.escape(name)}": part.rank for name, part in layers.items() if part.rank != r},
            "alpha_pattern": {f"^{re.escape(name)}": a for name, a in alphas.items() if a != lora_alpha},
            "target_modules": sorted(layers),
            "exclude_modules": None,
            "layers_to_transform": None,
            "layers_pattern": None,
            "lora_bias": bool(adapter.diffs),
            "init_lora_weights": True,
            "inference_mode": True,
        }


def _given(adapter: Adapter) -> dict[str, Any]:
    given = adapter.metadata.get(CONFIG_KEY)
    return {} if given is None else parse(given, adapter.source)


def _plain(key: str, all_keys: Collection[str]) -> str:
    """The key of a carried tensor as a model without PEFT calls it, unless the file has that one too."""
    match = _WRAPPED.fullmatch(key)
    plain = key if match is None else f"{match[1]}.{match[2]}"
    return key if plain in all_keys else plain


def _saved(config: Mapping[str, Any], adapter: Adapter) -> list[str]:
    """The entries of ``modules_to_save`` that mean modules the adapter does carry."""
    carried = [key.removeprefix(PREFIX) for key in adapter.extras]
    return [name for name in config.get("modules_to_save") or () if any(_lies_in(name, key) for key in carried)]


def _lies_in(module: str, key: str) -> bool:
    """Whether the parameter `key` lies in what an entry of ``modules_to_save`` means."""
    return re.match(rf"(.*\.)?{re.escape(module)}\.", key) is not None


def _scaled(tensors: Mapping[str, Tensor], scale: PeftScale) -> dict[str, Tensor]:
    """The factors of a LoHa or LoKr with the scale in one of them: PEFT's is alpha / r whatever is decomposed."""
    result: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        module, role = role_of(key) or ("", "")
        first = role in ("hada_w1_a", "lokr_w1", "lokr_w1_a")
        result[key] = scale.alpha(module) / scale.rank(module) * tensor.float() if first else tensor
    return result


def _unscaled(bias: Tensor, scale: float) -> Tensor:
    # a scale of 0 silences the bias of B too, so none can be stored
    return bias if scale == 0.0 else (bias.float() / scale).to(bias.dtype)


def _alpha(part: Any) -> float | int:
    alpha = part.rank if part.alpha is None else part.alpha
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _commonest(values: Any) -> Any:
    """The value most layers have; the smallest of several such."""
    counts = Counter(values)
    return min(counts, key=lambda value: (-counts[value], value))
