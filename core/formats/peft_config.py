"""``adapter_config.json``: scales and checks of one adapter, and the common configuration of several."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, cast

from ..adapter import CONFIG_KEY, Adapter, Source
from ..errors import FormatError, MergeError
from ..json_text import from_json
from .dora import DORA_REMEDY
from .patterns import PatternTable
from .peft_folder import CONFIG

PREFIX = "base_model.model."  # every key begins with it
_CHANGES_BASE = ("pissa", "olora", "corda", "lora_ga", "loftq")
# settings with which the update of a layer is not B @ A
_OTHER_UPDATES = {
    "use_qalora": "its A reads groups of inputs, not inputs",
    "use_bdlora": "its factors are block-diagonal",
    "kasa_config": "it changes the base model and has a diagonal between its factors",
    "monteclora_config": "its factors are sampled around those in the file",
    "arrow_config": "it chooses between other LoRAs, token by token",
}
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CPT", "CARTRIDGE")
# settings that change what an adapter does: they must be equal in all adapters of a merge
_MUST_AGREE = ("alora_invocation_tokens", "layer_replication")
_KIND_INDEPENDENT = ("base_model_name_or_path", "revision", "task_type", "auto_mapping", "modules_to_save")
_BIAS = ("none", "lora_only", "all")


def parse_config(text: str, source: Source) -> dict[str, Any]:
    """Parse the configuration of a LoRA, LoHa or LoKr.

    Raises:
        FormatError: The text is not JSON, or of another kind of adapter.
    """
    file = source.path or None
    try:
        config = from_json(text)
    except ValueError as error:
        raise FormatError(f"{CONFIG} is not JSON.", file=file, found=str(error)) from error
    if not isinstance(config, dict):
        raise FormatError(f"{CONFIG} is not a JSON object.", file=file, found=type(config).__name__)
    config = cast("dict[str, Any]", config)
    if not _has_valid_modules_to_save(config):
        raise FormatError(
            "The adapter configuration is not valid.",
            file=file,
            module="modules_to_save",
            expected="a list of names",
            found=repr(config["modules_to_save"]),
        )
    kind = str(config.get("peft_type")).upper()
    if kind not in ("LORA", "LOHA", "LOKR"):
        raise _not_a_lora(kind, file)
    return config


def _has_valid_modules_to_save(config: Mapping[str, Any]) -> bool:
    saved = config.get("modules_to_save") or []
    return isinstance(saved, list) and all(isinstance(name, str) for name in cast("list[object]", saved))


def _not_a_lora(kind: str, file: object) -> FormatError:
    if kind in _PROMPTS:
        reason = "it adds learnt tokens or states to the prompt and no matrix to any layer"
    elif kind == "IA3":
        reason = "it multiplies outputs of layers by learnt values and adds no matrix to any layer"
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


def _check_update(config: Mapping[str, Any], file: object, allow_dora: bool) -> None:
    """Raise unless the update is ``B @ A`` on an unchanged base model."""
    if config.get("use_dora") and not allow_dora:
        raise FormatError(
            "This is a DoRA: it rescales the base model's weights, which are not in the file.",
            file=file,
            found="use_dora is true",
            remedy=DORA_REMEDY,
        )
    if config.get("use_dora") and config.get("fan_in_fan_out"):
        raise FormatError(
            "A DoRA of layers with transposed weights cannot be turned into a LoRA here.",
            file=file,
            found="use_dora and fan_in_fan_out are true",
            remedy="merge it into the base model with PEFT, and extract a LoRA",
        )
    for key, reason in _OTHER_UPDATES.items():
        if config.get(key):
            raise FormatError(
                f"This LoRA cannot be merged from its files: {reason}.", file=file, found=f"{key} is set in {CONFIG}"
            )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_CHANGES_BASE):
        raise FormatError(
            "This LoRA belongs to a changed base model: its initialisation subtracted a part of the weights.",
            file=file,
            expected="init_lora_weights true, gaussian or another that leaves the base model unchanged",
            found=f"init_lora_weights {start}",
            remedy="save it with PEFT's path_initial_model_for_weight_conversion, which converts it to a plain LoRA",
        )


@dataclass(frozen=True)
class PeftScale:
    """Scales of modules by a PEFT configuration: ``alpha / r``, or ``alpha / sqrt(r)`` for rsLoRA.

    Args:
        r: Rank of modules that no key of `ranks` matches.
        lora_alpha: Alpha of modules that no key of `alphas` matches.
        use_rslora: Whether the scale is ``alpha / sqrt(r)``.
        ranks, alphas: The configuration's ``rank_pattern`` and ``alpha_pattern``.
    """

    r: int
    lora_alpha: float
    use_rslora: bool
    ranks: PatternTable
    alphas: PatternTable

    @staticmethod
    def from_config(config: Mapping[str, Any], source: Source, *, allow_dora: bool = False) -> PeftScale:
        """Make the scales of a configuration; in those of LoHa and LoKr the key of alpha is ``alpha``.

        Raises:
            FormatError: A value is not a number, or the update is not ``B @ A`` on an unchanged base model,
                or, unless `allow_dora`, a DoRA.
        """
        _check_update(config, source.path or None, allow_dora)
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
        except FormatError as error:  # from PatternTable
            raise error.at(source.path or None, CONFIG) from None
        except (TypeError, ValueError, AttributeError, OverflowError) as error:
            raise FormatError(
                "The adapter configuration is not valid.", file=source.path or None, found=str(error)
            ) from error

    def rank(self, module: str) -> int:
        """The configured rank of a module."""
        return self.ranks.get(module.removesuffix(".lora_embedding"), self.r)

    def alpha(self, module: str) -> float:
        """The configured alpha of a module."""
        return self.alphas.get(module.removesuffix(".lora_embedding"), self.lora_alpha)

    def __call__(self, module: str, rank: int) -> float | None:
        """The alpha for which ``alpha / rank`` is PEFT's scale; ``None`` where that scale is 1.

        Raises:
            FormatError: The configuration has another rank for the module.
        """
        configured = self.rank(module)
        if configured != rank:
            raise FormatError(
                "The rank in the configuration is not that of the factors.",
                expected=f"r = {configured} ({CONFIG})",
                found=f"r = {rank}",
                remedy="weights and configuration are not of one adapter: download or export both again",
            )
        alpha = self.alpha(module)
        alpha = alpha * math.sqrt(rank) if self.use_rslora else alpha
        return None if alpha == rank else float(alpha)


def lora_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A LoRA's configuration from a LoHa's or LoKr's: the entries that hold for both."""
    return {"peft_type": "LORA", **{key: config[key] for key in _KIND_INDEPENDENT if key in config}}


def labelled_configs(adapters: Sequence[Adapter]) -> list[tuple[str, dict[str, Any]]]:
    """Label and configuration of each adapter that has one."""
    result: list[tuple[str, dict[str, Any]]] = []
    for adapter in adapters:
        with suppress(ValueError):  # files of other formats may hold anything under this key
            config = from_json(adapter.metadata.get(CONFIG_KEY, "null"))
            valid = isinstance(config, dict) and _has_valid_modules_to_save(cast("dict[str, Any]", config))
            result += [(adapter.label, config)] if valid else []
    return result


def combine_configs(adapters: Sequence[Adapter]) -> dict[str, Any]:
    """The configuration of a merge of adapters; empty unless all adapters have one.

    Entries that are equal in all configurations are kept, e.g. the base model. Entries that describe extras are taken
    from any configuration that has them: layers saved whole, biases, trained tokens, layers with a transposed weight.

    Raises:
        MergeError: The configurations contradict each other.
    """
    labelled = labelled_configs(adapters)
    if not labelled or len(labelled) < len(adapters):
        return {}
    _check_agreement(labelled)
    configs = [config for _, config in labelled]
    result = {key: value for key, value in configs[0].items() if all(c.get(key) == value for c in configs)}
    saved = dict.fromkeys(name for config in configs for name in config.get("modules_to_save") or ())
    tokens = next((c[key] for c in configs if c.get(key := "trainable_token_indices") is not None), None)
    tied = [bool(config.get("ensure_weight_tying")) for config in configs]
    carried = {
        "modules_to_save": list(saved) or None,
        "trainable_token_indices": tokens,
        "fan_in_fan_out": any(config.get("fan_in_fan_out") for config in configs),
        "ensure_weight_tying": all(tied) or (any(tied) and not _adapts_embeddings(adapters)),
        "bias": max((str(config.get("bias") or "none") for config in configs), key=_bias_order),
    }
    present = {key for config in configs for key in config}
    return result | {key: value for key, value in carried.items() if key in present}


def _check_agreement(labelled: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    for key in (*_MUST_AGREE, "trainable_token_indices"):
        by_label = {label: config.get(key) for label, config in labelled}
        values = [value for value in by_label.values() if key in _MUST_AGREE or value is not None]
        if any(value != values[0] for value in values):
            raise MergeError(
                f"The configurations of the LoRAs contradict each other in {key}.",
                found=", ".join(f"{value} ({label})" for label, value in by_label.items()),
                remedy="merge only LoRAs that agree in it",
            )


def _adapts_embeddings(adapters: Sequence[Adapter]) -> bool:
    return any(name.endswith(".lora_embedding") for adapter in adapters for name in adapter.modules)


def _bias_order(bias: str) -> int:
    return _BIAS.index(bias) if bias in _BIAS else len(_BIAS)


def check_compatible(adapters: Sequence[Adapter]) -> None:
    """Raise unless the configurations of adapters agree, and the extras of PEFT adapters fit one model.

    Raises:
        MergeError: Different invocation tokens, embeddings of vocabularies of different size, heads for different
            numbers of classes.
    """
    _check_agreement(labelled_configs(adapters))
    peft_adapters = [adapter for adapter in adapters if adapter.source.format == "peft"]
    # weight -> an adapter with a LoRA on it, and the shape according to the factors (transposed for embeddings)
    adapted: dict[str, tuple[Adapter, tuple[int, int]]] = {}
    for adapter in peft_adapters:
        for module, part in adapter.modules.items():
            adapted[f"{module.removesuffix('.lora_embedding')}.weight"] = adapter, (part.d_out, part.d_in)
    # weight -> the first adapter with it among the extras, and its shape
    extras: dict[str, tuple[Adapter, tuple[int, ...]]] = {}
    for adapter in peft_adapters:
        for key, tensor in adapter.extras.items():
            name, shape = key.removeprefix(PREFIX), tuple(tensor.shape)
            first, first_shape = extras.setdefault(name, (adapter, shape))
            if first_shape != shape:
                raise _different_sizes(name, first, first_shape, adapter, shape)
            if name in adapted and math.prod(adapted[name][1]) != tensor.numel():
                raise _different_sizes(name, *adapted[name], adapter, shape)


def _different_sizes(name: str, first: Adapter, first_shape: object, other: Adapter, shape: object) -> MergeError:
    return MergeError(
        "The LoRAs do not fit the same model: one layer that they carry whole has different sizes.",
        file=f"{first.source.path or first.label} and {other.source.path or other.label}",
        module=name,
        expected="one size, e.g. one vocabulary",
        found=f"{first_shape} and {shape}",
        remedy="merge only LoRAs of one base model whose vocabulary was extended alike",
    )
