"""MoLE on transformers models: PEFT adapters as experts, and mixtures that follow the prompt or the token."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ...core.adapter import Adapter
from ...core.errors import MergeError, name_some
from ...core.layers.keymap import MappedRows, apply_key_map
from ...core.mole.attach import Attachment, attach
from ...core.mole.gates import GateSet
from ...core.mole.mixture import Mixture
from ...core.mole.scopes import uncompiled
from ...core.mole.trained import TrainedGates
from .texts import PromptTexts


def base_of(model: nn.Module) -> str:
    """What gates remember of the model they were trained on: its class."""
    return type(uncompiled(model)).__name__


def experts(model: nn.Module, adapters: Sequence[Adapter]) -> list[Adapter]:
    """LoRAs for a mixture on a model, under names that are paths in it.

    A LoRA of a model with a head fits the same model without one, and the other way round. What is no low-rank update
    (biases of B, layers trained in full) is not mixed: `Attachment.left_out` names it, and a warning says so.

    Args:
        model: The model the LoRAs were made for, without PEFT around it.
        adapters: As loaded.

    Raises:
        MergeError: Layers that are not in the model, or embeddings.
    """
    paths = {path for path, _ in uncompiled(model).named_modules()}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: list[Adapter] = []
    for adapter in adapters:
        file = adapter.source.path or adapter.label
        if embeddings := [name for name in adapter.modules if name.endswith(".lora_embedding")]:
            raise MergeError(
                "A LoRA of an embedding cannot be mixed at run time.",
                file=file,
                found=name_some(embeddings, 2),
                remedy="merge these LoRAs instead, or leave the embeddings out of them",
            )
        at = {
            name: next((path for path in (name, prefix + name, name.removeprefix(prefix)) if path in paths), None)
            for name in adapter.modules
        }
        if missing := [name for name, path in at.items() if path is None]:
            raise MergeError(
                "The LoRA was made for another base model.",
                file=file,
                expected=f"layers of {base_of(model)}",
                found=f"{len(missing)} layers that it lacks, such as {name_some(missing, 2)}",
                remedy="use the model the LoRA was trained for, as it was before PEFT wrapped it",
            )
        if rest := [*adapter.diffs, *adapter.extras]:
            warnings.warn(
                f"{adapter.label}: {len(rest)} parts such as {name_some(rest, 2)} are no low-rank updates and are not "
                "mixed",
                stacklevel=2,
            )
        found.append(
            apply_key_map(adapter, {name: (MappedRows(path),) for name, path in at.items() if path is not None})
        )
    return found


def load_gates(model: nn.Module, path: str | Path, adapters: Sequence[Adapter]) -> GateSet:
    """Trained gates for these LoRAs on this model, in the LoRAs' order.

    Args:
        model: The model. path: What `TrainedGates.save` wrote. adapters: See `experts`; of the gates' LoRAs, any.

    Raises:
        FormatError: No such file. MergeError: Gates for other LoRAs or another model.
    """
    return TrainedGates.load(path).of(adapters, base_of(model))


def mixed(model: nn.Module, mixture: Mixture, *, checkpointing: bool = False) -> Attachment:
    """A mixture on a model. Use it in a ``with`` block, or call `Attachment.detach` at the end::

        with mixed(model, mixture):
            model.generate(**tokenizer("The heart of", return_tensors="pt"))

    Gates per token (``reads="token"``) read each token where it stands. The others are per text: they read its prompt,
    without the padding, and every token after it takes them. The prompt is

    - in `generate`, what it is called with;
    - in a call with a cache, what the cache began with; the gates stay with the cache;
    - in a call with labels, what stands before the first token to be predicted (label -100);
    - in any other call all of the text, or what `Attachment.prompt` says.

    Args:
        model: A decoder or an encoder.
        mixture: See `experts`.
        checkpointing: See `attach`. The model's own (`gradient_checkpointing_enable`) works too.

    Raises:
        MergeError: See `attach`; gates that a language model has nothing to read for; an encoder with a decoder.
    """
    check_reads(mixture)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise MergeError(
            "A model with an encoder and a decoder reads two texts at once, which gates here do not tell apart.",
            found=base_of(model),
            remedy="attach the mixture with `legomole.attach`, with gates that are not trained",
        )
    texts = PromptTexts(uncompiled(model), tokens=mixture.gates.settings.reads == "token")
    attachment = attach(model, mixture, checkpointing=checkpointing, texts=texts)
    texts.listen(attachment)
    return attachment


def check_reads(mixture: Mixture, *, trains: bool = False) -> None:
    """Raise MergeError if the gates read what a language model does not have. Untrained gates read nothing."""
    reads = mixture.gates.settings.reads
    if (trains or mixture.gates.trained) and reads in ("text", "flat"):
        raise MergeError(
            "A language model has no text conditioning beside its own text."
            if reads == "text"
            else "Gates that read every position apart (flat) need texts of one length.",
            expected="gates that read hidden, experts or token",
            found=f"reads={reads}",
            remedy='choose GateSettings(reads="hidden"), or "token"',
        )
