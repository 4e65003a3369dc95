"""``adapter_config.json``: what it says of one adapter, and what one can say of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import FormatError, MergeError
from ..json_text import from_json
from .patterns import PatternTable
from .peft_folder import CONFIG

PREFIX = "base_model.model."  # of every key
_CHANGED_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# settings that make of a LoRA something else than B @ A added to the weight of a layer
_OTHER_UPDATES = {
    "target_parameters": "it adapts bare parameters (mixtures of experts), not layers",
    "use_qalora": "its A reads groups of inputs, not inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it changes the base model and has a diagonal between its factors",
    "monteclora_config": "its factors are drawn at random around those in the file",
    "arrow_config": "it chooses between other LoRAs, token by token",
}
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
# without these a merged configuration says something else than the adapters it is of
_EQUAL = ("alora_invocation_tokens", "layer_replication")
_SHARED = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")
_BIAS = ("none", "lora_only", "all")


def parse(text: str, source: Source) -> dict[str, Any]:
    """The configuration of a LoRA, LoHa or LoKr.

    Raises:
        FormatError: Broken JSON, or another kind of adapter.
    """
    file = source.path or None
    try:
        config = from_json(text)
    except ValueError as error:
        raise FormatError(f"{CONFIG} is not JSON.", file=file, found=str(error)) from error
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG} is not a JSON object.", file=file, found=type(config).__name__)
    config = cast("dict[str, Any]", config)
    if not _sound(config):
        raise FormatError(
            "The adapter configuration is not sound.",
            file=file,
            module="modules_to_save",
            expected="a list of names",
            found=repr(config["modules_to_save"]),
        )
    kind = str(config.get("peft_type")).upper()
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise _other_kind(kind, file)
    return config


def _sound(config: Mapping[str, Any]) -> bool:
    saved = config.get("modules_to_save") or []
    return isinstance(saved, list) and all(isinstance(name, str) for name in cast("list[object]", saved))


def _other_kind(kind: str, file: object) -> FormatError:
    if kind in _PROMPTS:
        reason = "it adds learnt tokens or states to the prompt and no matrix to any layer"
    elif kind == "IA3":
        reason = "it multiplies what layers put out by learnt numbers and adds no matrix to them"
    else:
        return FormatError(
            "This PEFT adapter is not a LoRA.",
            file=file,
            expected="peft_type LORA, or LOHA or LOKR with a convert_rank",
            found=f"peft_type {kind}",
            remedy="if PEFT can turn it into a LoRA, do that first: peft.save_as_lora(folder, model, rank=16), on the "
            "base model with this adapter",
        )
    return FormatError(
        f"This PEFT adapter is not a LoRA: {reason}.", file=file, expected="peft_type LORA", found=f"peft_type {kind}"
    )


def _check_update(config: Mapping[str, Any], file: object) -> None:
    if config.get("use_dora"):
        raise FormatError(
            "This is a DoRA: it rescales the base model's weights, which are not in the file.",
            file=file,
            found="use_dora is true",
            remedy="convert it in ComfyUI with the model connected, where the base weights are known",
        )
    for key, reason in _OTHER_UPDATES.items():
        if config.get(key):
            raise FormatError(
                f"This LoRA cannot be merged from its files: {reason}.", file=file, found=f"{key} is set in {CONFIG}"
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGED_BASE):
        raise FormatError(
            "This LoRA belongs to a changed base model: its training began by taking a part out of the weights.",
            file=file,
            expected="init_lora_weights true, gaussian or another that leaves the base model alone",
            found=f"init_lora_weights {start}",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion, which makes a plain LoRA of it",
        )


@dataclass(frozen=True)
class PeftScale:
    """How a PEFT configuration scales a module: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA."""

    r: int
    lora_alpha: float
    use_rslora: bool
    ranks: PatternTable
    alphas: PatternTable

    @staticmethod
    def from_config(config: Mapping[str, Any], source: Source) -> PeftScale:
        """Of a LoRA's configuration; a LoHa's and LoKr's alpha is called ``alpha``.

        Raises:
            FormatError: Numbers that are none, or a LoRA that is not ``B @ A`` on an unchanged base model.
        """
        _check_update(config, source.path or None)
        try:
            r = int(config.get("r", 8))
            if r < 1:
                raise ValueError(f"r = {r}")
            return PeftScale(
                r,
                float(config.get("lora_alpha", config.get("alpha", 8))),
                bool(config.get("use_rslora")),
                PatternTable({str(key): int(value) for key, value in (config.get("rank_pattern") or {}).items()}),
                PatternTable({str(key): float(value) for key, value in (config.get("alpha_pattern") or {}).items()}),
            )
        except FormatError as error:  # of a pattern
            raise error.at(source.path or None, CONFIG) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(
                "The adapter configuration is not sound.", file=source.path or None, found=str(error)
            ) from error

    def rank(self, module: str) -> int:
        return self.ranks.get(module.removesuffix(".lora_embedding"), self.r)

    def alpha(self, module: str) -> float:
        return self.alphas.get(module.removesuffix(".lora_embedding"), self.lora_alpha)

    def __call__(self, module: str, rank: int) -> float | None:
        """The alpha for which ``alpha / rank`` is PEFT's scale; ``None`` where that scale is 1."""
        configured = self.rank(module)
        if configured != rank:
            raise FormatError(
                "The rank in the configuration is not that of the factors.",
                expected=f"r = {configured} ({CONFIG})",
                found=f"r = {rank}",
                remedy="weights and configuration do not belong together",
            )
        alpha = self.alpha(module)
        alpha = alpha * math.sqrt(rank) if self.use_rslora else alpha
        return None if alpha == rank else float(alpha)


def as_lora(config: Mapping[str, Any]) -> dict[str, Any]:
    """What the configuration of another kind of adapter says that is true of a LoRA made of it too."""
    return {"peft_type": "LORA", **{key: config[key] for key in _SHARED if key in config}}


def configs(adapters: Sequence[Adapter]) -> list[tuple[str, dict[str, Any]]]:
    """Label and configuration of those adapters that have one."""
    found: list[tuple[str, dict[str, Any]]] = []
    for adapter in adapters:
        with suppress(ValueError):  # files of other formats may hold anything under that name
            config = from_json(adapter.metadata.get(CONFIG_KEY, "null"))
            found += [(adapter.label, config)] if isinstance(config, dict) and _sound(config) else []
    return found


def combined(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """One configuration for several adapters, empty unless all have one.

    Kept is what all say alike, e.g. their base model. What describes tensors that are carried along is true if one
    adapter says it: layers saved whole, biases, trained tokens, layers that store their weight transposed.

    Raises:
        MergeError: They say things that cannot both be true of one adapter.
    """
    found = configs(adapters)
    if not found or len(found) < len(adapters):
        return {}
    _demand_agreement(found)
    every = [config for _, config in found]
    result = {key: value for key, value in every[0].items() if all(c.get(key) == value for c in every)}
    whole = dict.fromkeys(name for config in every for name in config.get("modules_to_save") or ())
    tokens = next((c[key] for c in every if c.get(key := "trainable_token_indices") is not None), None)
    tied = [bool(config.get("ensure_weight_tying")) for config in every]
    stated = {
        "modules_to_save": list(whole) or None,
        "trainable_token_indices": tokens,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in every),
        "ensure_weight_tying": all(tied) or (any(tied) and not _embeds(adapters)),
        "bias": max((str(config.get("bias") or "none") for config in every), key=_strength),
    }
    told = {key for config in every for key in config}
    return result | {key: value for key, value in stated.items() if key in told}


def _demand_agreement(found: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    for key in (*_EQUAL, "trainable_token_indices"):
        said = {label: config.get(key) for label, config in found}
        values = [value for value in said.values() if key in _EQUAL or value is not None]
        if any(value != values[0] for value in values):
            raise MergeError(
                f"The configurations of the LoRAs contradict each other in {key}.",
                found=", ".join(f"{value} ({label})" for label, value in said.items()),
                remedy="merge only LoRAs that agree in it",
            )


def _embeds(adapters: Sequence[Adapter]) -> bool:
    return any(name.endswith(".lora_embedding") for adapter in adapters for name in adapter.modules)


def _strength(bias: str) -> int:
    return _BIAS.index(bias) if bias in _BIAS else len(_BIAS)


def check_together(adapters: Sequence[Adapter]) -> None:
    """Raise unless the configurations of adapters agree, and whole tensors that PEFT adapters carry along fit.

    Raises:
        MergeError: Different tokens that wake an adapter, embeddings of vocabularies of different size, heads for
            different numbers of classes.
    """
    _demand_agreement(configs(adapters))
    carried = [adapter for adapter in adapters if adapter.source.format == "peft"]
    sizes: dict[str, tuple[Adapter, tuple[int, ...], int]] = {}  # layer -> who, shape as told, numbers of its weight
    parts = {name.removesuffix(".lora_embedding"): (a, part) for a in carried for name, part in a.modules.items()}
    for name, (adapter, part) in parts.items():
        sizes[f"{name}.weight"] = adapter, (part.d_out, part.d_in), part.d_out * part.d_in
    whole: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
    for adapter in carried:
        for key, tensor in adapter.extras.items():
            name, shape = key.removeprefix(PREFIX), tuple(tensor.shape)
            first, known = whole.setdefault(name, (adapter, shape))
            if known != shape:
                raise _misfit(name, first, known, adapter, shape)
            if name in sizes and sizes[name][2] != tensor.numel():
                raise _misfit(name, sizes[name][0], sizes[name][1], adapter, shape)


def _misfit(name: str, first: Adapter, known: object, other: Adapter, shape: object) -> MergeError:
    return MergeError(
        "The LoRAs do not fit the same model: one layer that they carry whole has different sizes.",
        file=f"{first.source.path or first.label} and {other.source.path or other.label}",
        module=name,
        expected="one size, e.g. one vocabulary",
        found=f"{known} and {shape}",
        remedy="merge only LoRAs of one base model whose vocabulary was extended alike",
    )
