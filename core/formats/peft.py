"""PEFT: a folder of ``adapter_model.safetensors`` and ``adapter_config.json``, which holds the scale."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from ..adapter import Adapter, Source
from ..errors import FormatError, SaveError, name_some
from . import reading, writing

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
CONFIG_KEY = "adapter_config"  # the configuration's place in an adapter's metadata
_PREFIX = "base_model.model."
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")


@dataclass(frozen=True)
class PeftScale:
    """How a PEFT configuration scales a module: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA."""

    r: int
    lora_alpha: float
    use_rslora: bool
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    source: Source

    @staticmethod
    def from_config(config: Mapping[str, Any], source: Source) -> PeftScale:
        if config.get("use_dora"):
            raise FormatError(
                "This is a DoRA: it rescales the base model's weights, which are not in the file.",
                file=source.path or None,
                found="use_dora is true",
                remedy="convert it in ComfyUI with the model connected, where the base weights are known",
            )
        start = str(config.get("init_lora_weights")).lower()
        if start.startswith(_CHANGED_BASE):
            raise FormatError(
                "This LoRA belongs to a changed base model: its training began by taking a part out of the weights.",
                file=source.path or None,
                expected="init_lora_weights true, gaussian or another that leaves the base model alone",
                found=f"init_lora_weights {start}",
                remedy="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
            )
        try:
            return PeftScale(
                int(config.get("r", 8)),
                float(config.get("lora_alpha", 8)),
                bool(config.get("use_rslora")),
                {str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()},
                {str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()},
                source,
            )
        except (TypeError, ValueError, AttributeError) as error:
            raise FormatError(
                "The adapter configuration is not sound.", file=source.path or None, found=str(error)
            ) from error

    def __call__(self, module: str, rank: int) -> float | None:
        """The alpha for which ``alpha / rank`` is PEFT's scale; ``None`` where that scale is 1."""
        module = module.removesuffix(".lora_embedding")
        configured = _match(self.rank_pattern, module, self.r)
        if configured != rank:
            raise FormatError(
                "The rank in the configuration is not that of the factors.",
                expected=f"r = {configured} ({CONFIG})",
                found=f"r = {rank}",
                remedy="weights and configuration do not belong together, or the adapter targets bare parameters "
                "(mixture of experts), which is not supported",
            )
        alpha = _match(self.alpha_pattern, module, self.lora_alpha)
        alpha = alpha * math.sqrt(rank) if self.use_rslora else alpha
        return None if alpha == rank else float(alpha)


def _match(pattern: Mapping[str, Any], module: str, default: Any) -> Any:
    """A pattern is a regular expression for the end of the name, from a dot on; the first that matches counts."""
    for key, value in pattern.items():
        try:
            if re.match(rf"(.*\.)?({key})$", module):
                return value
        except re.error as error:
            raise FormatError("A pattern in the configuration is not a regular expression.", found=key) from error
    return default


class Peft:
    """Written by PEFT. Names lose the wrapper's ``base_model.model.`` and get it back."""

    name = "peft"

    def matches(self, keys: Collection[str]) -> bool:
        return any(key.startswith(_PREFIX) for key in keys)

    def fits(self, module: str) -> bool:
        return not module.startswith(("lora_unet_", "lora_te", "lycoris_", "diffusion_model.", "text_encoders."))

    def carries(self, module: str) -> bool:
        return self.fits(module)

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Source, convert_rank: int | None
    ) -> Adapter:
        """A lone file without a configuration has scale 1, as image programs read it."""
        config = _parse(metadata[CONFIG_KEY], source) if CONFIG_KEY in metadata else None
        named = {key.removeprefix(_PREFIX): tensor for key, tensor in tensors.items()}
        adapter = reading.assemble(
            named,
            metadata,
            source,
            convert_rank=convert_rank,
            alpha_of=None if config is None else PeftScale.from_config(config, source),
        )
        originals = {key.removeprefix(_PREFIX): key for key in tensors}
        extras = {originals[key]: tensor for key, tensor in adapter.extras.items()}
        return Adapter(adapter.modules, adapter.diffs, extras, metadata, source)

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        writing.demand_names(adapter, self.name, self.fits, "model.layers.0.self_attn.q_proj")
        state: dict[str, Tensor] = {}
        for name, part in adapter.modules.items():
            down, up = writing.factors(part)
            if name.endswith(".lora_embedding"):
                state[f"{_PREFIX}{name}_A"], state[f"{_PREFIX}{name}_B"] = down, up
            else:
                state[f"{_PREFIX}{name}.lora_A.weight"], state[f"{_PREFIX}{name}.lora_B.weight"] = down, up
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
            state[f"{_PREFIX}{name}.lora_B.bias"] = bias if part.scale == 1.0 else _unscaled(bias, part.scale)
        return writing.with_extras(state, adapter), {"format": "pt", **writing.strings(adapter.metadata, CONFIG_KEY)}

    def config(self, adapter: Adapter) -> dict[str, Any]:
        """The ``adapter_config.json`` of the adapter: what the inputs' said, but our own ranks, alphas and targets."""
        given = adapter.metadata.get(CONFIG_KEY)
        kept = {} if given is None else _parse(given, adapter.source)
        layers = {name.removesuffix(".lora_embedding"): part for name, part in adapter.modules.items()}
        r = _commonest(part.rank for part in layers.values())
        alphas = {name: _alpha(part) for name, part in layers.items()}
        lora_alpha = _commonest(alphas.values())
        return {
            "bias": "none",
            "fan_in_fan_out": False,
            **kept,
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


def _parse(text: str, source: Source) -> dict[str, Any]:
    try:
        config = json.loads(text)
    except ValueError as error:
        raise FormatError(f"{CONFIG} is not JSON.", file=source.path or None, found=str(error)) from error
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG} is not a JSON object.", file=source.path or None, found=type(config).__name__)
    kind = cast("dict[str, Any]", config).get("peft_type")
    if str(kind).upper() != "LORA":
        raise FormatError(
            "This PEFT adapter is not a LoRA.", file=source.path or None, expected="peft_type LORA", found=kind
        )
    return cast("dict[str, Any]", config)


def read_folder(folder: Path) -> tuple[Path, str]:
    """The weight file of a PEFT folder and the text of its configuration.

    Raises:
        FormatError: Either is missing, or the weights are only there as a pickle.
    """
    weights, config = folder / WEIGHTS, folder / CONFIG
    if not config.is_file() and not weights.is_file():
        raise FormatError(
            "The folder holds no PEFT adapter.", file=folder, expected=f"{WEIGHTS} and {CONFIG}", found="neither"
        )
    if not config.is_file():
        raise FormatError(
            f"The folder has no {CONFIG}, so the scale is unknown.",
            file=folder,
            remedy=f"fetch {CONFIG} from where the adapter came from",
        )
    if not weights.is_file():
        pickle = folder / "adapter_model.bin"
        raise FormatError(
            f"The folder has no {WEIGHTS}.",
            file=folder,
            found="adapter_model.bin, a pickle, which can run any program when it is opened; it was not"
            if pickle.exists()
            else "only the configuration: the download or save was interrupted",
            remedy="get the safetensors version of the weights",
        )
    try:
        return weights, config.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{CONFIG} cannot be read.", file=config, found=str(error)) from error
