"""Mixtures (MoLE) on transformers models: PEFT adapters as experts, and gates per prompt or per token."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

from torch import nn

from ...core.adapter import Adapter
from ...core.errors import MergeError, name_some
from ...core.formats.peft_experts import parameter_of
from ...core.layers.keymap import MappedRows, apply_key_map
from ...core.mole.attach import Attachment, attach
from ...core.mole.gates import READS_TEXT, GateSet
from ...core.mole.mixture import Mixture
from ...core.mole.scopes import uncompiled
from ...core.mole.trained import TrainedGates
from ..base_model import base_model_name, other_base_model
from .texts import TransformersTextReader


def experts(model: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """Rename adapters to the module paths of a model.

    An adapter of a model with a head fits the same model without the head, and the other way round. Parts that are not
    low-rank updates (biases of B, layers trained in full) are not mixed: `Attachment.left_out` lists them, and a
    warning names some.

    Args:
        model: The model that the adapters were trained for, not wrapped by PEFT.
        adapters: The adapters as loaded.

    Raises:
        MergeError: An adapter has layers that the model lacks, or changes embeddings.
    """
    renamed: list[Adapter] = []
    for adapter in adapters:
        if embeddings := [name for name in adapter.modules if name.endswith(".lora_embedding")]:
            raise MergeError(
                "A LoRA of an embedding cannot be mixed at run time.",
                file=adapter.source.path or adapter.label,
                found=name_some(embeddings, 2),
                remedy="merge these LoRAs instead, or remove the embeddings from them",
            )
        if experts := [name for name in adapter.modules if parameter_of(name) is not None]:
            raise MergeError(
                "A LoRA of stacked experts (target_parameters) cannot be mixed at run time.",
                file=adapter.source.path or adapter.label,
                found=name_some(experts, 2),
                remedy="merge these LoRAs instead",
            )
        path_of = layer_paths(model, adapter.modules)
        if missing := [name for name, path in path_of.items() if path is None]:
            remedy = "use the model the LoRA was trained for, without PEFT's wrapper"
            raise other_base_model(adapter, missing, model, remedy)
        if left_out := [*adapter.diffs, *adapter.extras]:
            warnings.warn(
                f"{adapter.label}: {len(left_out)} parts such as {name_some(left_out, 2)} are not low-rank updates and "
                "are not mixed",
                stacklevel=2,
            )
        renamed.append(
            apply_key_map(adapter, {name: (MappedRows(path),) for name, path in path_of.items() if path is not None})
        )
    return renamed


def layer_paths(model: nn.Module, names: Iterable[str]) -> dict[str, str | None]:
    """Path in the model of each named layer, with or without the prefix of models with a head; ``None`` if missing."""
    paths = {path for path, _ in uncompiled(model).named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    return {
        name: next((path for path in (name, prefix + name, name.removeprefix(prefix)) if path in paths), None)
        for name in names
    }


def load_gates(model: nn.Module, path: str | Path, adapters: Sequence[Adapter]) -> GateSet:
    """Load trained gates for adapters on a model, see `hosts.api.load_gates`."""
    return TrainedGates.load(path).of(adapters, base_model_name(model))


def mixed(model: nn.Module, mixture: Mixture, *, checkpointing: bool = False) -> Attachment:
    """Attach a mixture to a model.

    Use it in a ``with`` block, or call `Attachment.detach` at the end::

        with mixed(model, mixture):
            model.generate(**tokenizer("The heart of", return_tensors="pt"))

    Gates per token (``reads="token"``) read every token by itself. Other gates read the prompt of each text without its
    padding, and all later tokens of the text use the same gate values. The prompt is

    - in `generate`: its input;
    - in a call with a cache: the input that started the cache; the gate values are kept with the cache;
    - in a call with labels: the tokens before the first one to be predicted (the first label that is not -100);
    - in any other call: the whole text, or the positions given to `Attachment.prompt`.

    Args:
        model: A decoder or an encoder.
        mixture: Adapters from `experts`, with their gates.
        checkpointing: Recompute blocks in the backward pass, see `attach`. The model's own checkpointing
            (`gradient_checkpointing_enable`) works too.

    Raises:
        MergeError: See `attach`; or the gates read an input that language models lack, or the model has both an encoder
            and a decoder.
    """
    check_gate_inputs(mixture)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MergeError(
            "Gates cannot work on a model with an encoder and a decoder, which reads two texts at once.",
            found=base_model_name(model),
            remedy="attach the mixture with `legomole.attach`, with untrained gates",
        )
    texts = TransformersTextReader(uncompiled(model), tokens=mixture.gates.settings.reads == "token")
    attachment = attach(model, mixture, checkpointing=checkpointing, texts=texts)
    texts.install(attachment)
    return attachment


def check_gate_inputs(mixture: Mixture, *, trains: bool = False) -> None:
    """Raise MergeError if the gates read an input that language models lack.

    Args:
        mixture: The mixture. Untrained gates read nothing and pass.
        trains: Whether the gates are going to be trained; then untrained ones are checked too.
    """
    reads = mixture.gates.settings.reads
    if (trains or mixture.gates.trained) and reads in (*READS_TEXT, "flat"):
        raise MergeError(
            "A language model has no text conditioning beside its own text."
            if reads in READS_TEXT
            else "Gates that read every position separately (flat) need texts of one length.",
            expected="gates that read hidden, experts or token",
            found=f"reads={reads}",
            remedy='choose GateSettings(reads="hidden"), or "token"',
        )
