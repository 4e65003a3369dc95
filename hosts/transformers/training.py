"""Training the gates of a mixture on a causal language model."""

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

from ...core.digest import digest, some_of
from ...core.errors import FormatError, MergeError
from ...core.mole.mixture import Mixture
from ...core.progress import Progress
from ...core.train import Devices, FitSettings, Text, TrainingResult, train_on_texts
from ...core.train.frozen import frozen
from ..hub import cached_folder
from .mixing import base_of, check_reads, mixed

Words = str | Tensor | list[int]
Example = Words | tuple[Words, Words]


def load_model(path: str | Path, *, device: str = "cpu", dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """A causal language model and its tokenizer from a folder, or under its name from the local cache.

    A model that was saved quantised stays so. Nothing is downloaded.

    Raises:
        FormatError: There is none.
    """
    # a name would be looked for on the Hub, local_files_only or not: for an adapter that it might be
    folder = str(path if Path(path).is_dir() else cached_folder(str(path), "model"))
    logging.disable_progress_bar()
    renamed = tuple(map(int, version("transformers").split(".")[:2])) >= (4, 56)
    place: dict[str, Any] = {"device_map": device, "dtype" if renamed else "torch_dtype": dtype}
    safe: dict[str, Any] = {"trust_remote_code": False}  # unless told so, transformers asks on the terminal
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True, **safe, **place)
        return model.eval(), AutoTokenizer.from_pretrained(folder, **safe)
    except Exception as error:  # of a damaged file its parsers raise errors of every kind
        raise FormatError(
            "The language model cannot be loaded.",
            file=path,
            expected="a causal language model and its tokenizer, as transformers saves them",
            found=f"{type(error).__name__}: {error}".partition("\n")[0],
            remedy="save both with save_pretrained(FOLDER)",
        ) from error


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
    """Train the gates of a mixture on a causal language model, which is left as it was.

    The loss is the model's own: how well it predicts the answers. The gates of a text read its prompt, see `mixed`.

    Args:
        model: The model, with its head.
        mixture: Of untrained gates; their settings say what is trained: ``hidden``, ``experts`` or ``token``.
        examples: Per LoRA, a few of ``(prompt, answer)``; for gates per token plain texts as well, of which every token
            is learnt. As strings, which get the tokenizer's special tokens at their beginning and nothing at their
            end, or as token ids.
        tokenizer: For strings.
        settings: How to train; default `FitSettings` with a batch of 8.
        others: Examples of none of the LoRAs, on which the base model's predictions are to stay.
        checkpointing: Save memory by computing blocks twice; always so where the model's own is enabled.
        folder, devices, progress, keep: See `core.train.train_on_texts`.

    Raises:
        MergeError: A model without next tokens, or gates, LoRAs or examples that cannot be trained with.
        FormatError: `folder` holds another training.
    """
    check_reads(mixture, trains=True)
    if not model.can_generate():
        raise MergeError(
            "Gates learn from the next token, which this model does not predict.",
            expected="a causal language model with its head (..ForCausalLM)",
            found=base_of(model),
        )
    if len(examples) != len(mixture.experts):
        raise MergeError("Every LoRA needs examples.", expected=f"{len(mixture.experts)} lists", found=len(examples))
    plain = mixture.gates.settings.reads == "token"
    texts = [_text(example, tokenizer, i, plain) for i, own in enumerate(examples) for example in own]
    texts += [_text(example, tokenizer, None, plain) for example in others]
    checkpointing = checkpointing or bool(getattr(model, "is_gradient_checkpointing", False))
    with frozen([model]), mixed(model, mixture, checkpointing=checkpointing) as attachment:
        device = model.get_input_embeddings().weight.device

        def logits(texts: Sequence[Text]) -> Tensor:
            ids = pad_sequence([text.ids for text in texts], batch_first=True).to(device)
            at = torch.arange(ids.shape[1], device=device)
            ends = torch.tensor([[len(text.ids)] for text in texts], device=device)
            starts = torch.tensor([[text.start] for text in texts], device=device)
            with attachment.prompt(at < starts):
                return model(input_ids=ids, attention_mask=(at < ends).long(), use_cache=False).logits

        return train_on_texts(
            attachment, mixture, texts, logits, settings or FitSettings(batch=8),
            base=base_of(model), identity=digest(some_of(list(model.parameters()))),
            folder=folder, devices=devices, progress=progress, keep=keep,
        )  # fmt: skip


def _text(example: Example, tokenizer: Any, expert: int | None, plain: bool) -> Text:
    if isinstance(example, tuple):
        prompt, answer = example
        parts = [_ids(prompt, tokenizer, True), _ids(answer, tokenizer, False)]
        return Text(torch.cat(parts), len(parts[0]), expert)
    if not plain:
        raise MergeError(
            "These gates read the prompt, and an example does not say where it ends.",
            expected="(prompt, answer)",
            found="a text",
            remedy='give examples as (prompt, answer), or choose GateSettings(reads="token")',
        )
    return Text(_ids(example, tokenizer, True), 1, expert)


def _ids(words: Words, tokenizer: Any, first: bool) -> Tensor:
    """Token ids ``(T,)``; `first`: of a text's beginning, which gets the tokenizer's special tokens."""
    if not isinstance(words, str):
        return torch.as_tensor(words, dtype=torch.long)
    if tokenizer is None:
        raise MergeError(
            "Examples in words need a tokenizer.",
            found=repr(words[:40]),
            remedy="give the model's tokenizer, or token ids",
        )
    return torch.tensor(tokenizer(words, add_special_tokens=first)["input_ids"], dtype=torch.long)
