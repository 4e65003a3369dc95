"""Train the gates of a mixture on a causal language model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.models.auto.modeling_auto import AutoModelForCausalLM
from transformers.models.auto.tokenization_auto import AutoTokenizer
from transformers.utils import logging

from ...core.errors import MergeError
from ...core.mole.mixture import Mixture
from ...core.progress import Progress
from ...core.train import Devices, FitSettings, Text, TrainingResult, train_on_texts
from ...core.train.frozen import frozen
from ..base_model import base_model_name, weights_digest
from ..hub import cached_folder
from ..loading import format_errors
from .mixing import check_gate_inputs, mixed

TextOrIds = str | Tensor | list[int]
Example = TextOrIds | tuple[TextOrIds, TextOrIds]


def load_model(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """Load a causal language model and its tokenizer from a folder, or by name from the local Hugging Face cache.

    A model that was saved quantised stays quantised. Downloads nothing.

    Args:
        path: Folder, or name: ``OWNER/NAME`` or ``OWNER/NAME@REVISION`` with a branch, tag or commit.
        device: Device the model is loaded to.
        dtype: Dtype of its weights.

    Raises:
        FormatError: The folder or name does not exist, or is damaged.
    """
    # looked up here: given a name, transformers asks the Hub whether it is an adapter, even with local_files_only
    folder = str(path if Path(path).is_dir() else cached_folder(str(path), "model"))
    logging.disable_progress_bar()
    renamed = tuple(map(int, version("transformers").split(".")[:2])) >= (4, 56)
    placement: dict[str, Any] = {"device_map": device, "dtype" if renamed else "torch_dtype": dtype}
    safe: dict[str, Any] = {"trust_remote_code": False}  # by default transformers asks on the terminal
    with format_errors(
        "The language model cannot be loaded.",
        path,
        expected="a causal language model and its tokenizer, as transformers saves them",
        remedy="save both with save_pretrained(FOLDER)",
    ):
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe, **placement)
        return model.eval(), AutoTokenizer.from_pretrained(folder, **safe)


def train_gates(
    model: Any,
    mixture: Mixture,
    examples: Sequence[Sequence[Example]],
    tokenizer: Any = None,
    settings: FitSettings | None = None,
    *,
    others: Sequence[Example] = (),
    checkpointing: bool = False,
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    keep: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Train the gates of a mixture on a causal language model. The model is left unchanged.

    The loss is the model's own, the cross entropy of the answers' tokens. Gates per text read the prompt, see `mixed`.

    Args:
        model: The model with its head.
        mixture: A mixture with untrained gates that read ``hidden``, ``experts`` or ``token``.
        examples: Per expert, a few ``(prompt, answer)`` pairs; for gates per token also plain texts, of which every
            token is learnt. Each part is a string, which gets the tokenizer's special tokens at the start of the text
            and none at its end, or a list or tensor of token ids.
        tokenizer: The model's tokenizer; needed for strings only.
        settings: Training settings; default `FitSettings` with a batch size of 8.
        others: Examples for none of the experts, on which the base model's predictions are preserved.
        checkpointing: Recompute blocks in the backward pass to save memory; always on if the model's own gradient
            checkpointing is on.
        folder, devices, progress, keep: See `core.train.train_on_texts`.

    Raises:
        MergeError: The model has no language model head, or gates, adapters or examples cannot be used for training.
        FormatError: `folder` holds another training.
    """
    check_gate_inputs(mixture, trains=True)
    if not model.can_generate():
        raise MergeError(
            "Gates learn from next-token predictions, which this model does not make.",
            expected="a causal language model with its head (..ForCausalLM)",
            found=base_model_name(model),
        )
    if len(examples) != len(mixture.experts):
        raise MergeError("Every LoRA needs examples.", expected=f"{len(mixture.experts)} lists", found=len(examples))
    plain = mixture.gates.settings.reads == "token"
    texts = [_as_text(example, tokenizer, i, plain) for i, expert in enumerate(examples) for example in expert]
    texts += [_as_text(example, tokenizer, None, plain) for example in others]
    checkpointing = checkpointing or bool(getattr(model, "is_gradient_checkpointing", False))
    with frozen([model]), mixed(model, mixture, checkpointing=checkpointing) as attachment:
        device = model.get_input_embeddings().weight.device

        def logits(texts: Sequence[Text]) -> Tensor:
            ids = pad_sequence([text.ids for text in texts], batch_first=True).to(device)
            position = torch.arange(ids.shape[1], device=device)
            ends = torch.tensor([[len(text.ids)] for text in texts], device=device)
            starts = torch.tensor([[text.start] for text in texts], device=device)
            with attachment.prompt(position < starts):
                return model(input_ids=ids, attention_mask=(position < ends).long(), use_cache=False).logits

        return train_on_texts(
            attachment, mixture, texts, logits, settings or FitSettings(batch=8),
            base=base_model_name(model), identity=weights_digest(model),
            folder=folder, devices=devices, progress=progress, keep=keep,
        )  # fmt: skip


def _as_text(example: Example, tokenizer: Any, expert: int | None, plain: bool) -> Text:
    """Tokenize an example; `plain`: whether texts without a prompt are allowed."""
    if isinstance(example, tuple):
        prompt, answer = example
        parts = [_token_ids(prompt, tokenizer, True), _token_ids(answer, tokenizer, False)]
        return Text(torch.cat(parts), len(parts[0]), expert)
    if not plain:
        raise MergeError(
            "These gates read the prompt, and an example does not say where it ends.",
            expected="(prompt, answer)",
            found="a text",
            remedy='give examples as (prompt, answer), or choose GateSettings(reads="token")',
        )
    return Text(_token_ids(example, tokenizer, True), 1, expert)


def _token_ids(text: TextOrIds, tokenizer: Any, special_tokens: bool) -> Tensor:
    """Token ids ``(T,)``; for strings with or without the tokenizer's special tokens."""
    if not isinstance(text, str):
        return torch.as_tensor(text, dtype=torch.long)
    if tokenizer is None:
        raise MergeError(
            "Examples given as strings need a tokenizer.",
            found=repr(text[:40]),
            remedy="give the model's tokenizer, or token ids",
        )
    return torch.tensor(tokenizer(text, add_special_tokens=special_tokens)["input_ids"], dtype=torch.long)
