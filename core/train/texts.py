"""Train the gates of a language model, by its own loss on a few texts per LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..digest import digest
from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.mixture import Mixture
from ..progress import Progress
from .features import MEASURED_EXAMPLES, standardise_features
from .fit import Devices
from .settings import FitSettings
from .training import TrainingResult, TrainingRun, check_trainable


@dataclass(frozen=True, eq=False)
class Text:
    """A training text: a prompt and its continuation.

    Args:
        ids: ``(T,)`` long, token ids.
        start: The first token to predict, 1 .. T - 1. The tokens before it are the prompt, which the gates of a text
            read.
        expert: Index of the LoRA it is for; ``None`` for a text for which the base model is to be preserved.
    """

    ids: Tensor
    start: int
    expert: int | None = None


# The gated model: texts to logits (B, T, vocabulary), in the order of their tokens; padding may follow each text.
Logits = Callable[[Sequence[Text]], Tensor]


class NextToken:
    """The language model loss on the LoRAs' texts, and the divergence from the base model on the other texts.

    Every text counts equally, whatever its length.

    Args:
        logits: The gated model.
        texts: The training texts.
        base: For texts without a LoRA, the base model's logits ``(T - start + 1, vocabulary)`` from the last token of
            the prompt; ``None`` for the others. The loss there is the Kullback-Leibler divergence from the base model.
    """

    def __init__(self, logits: Logits, texts: Sequence[Text], base: Sequence[Tensor | None]) -> None:
        self.logits, self.texts, self.base, self.size = logits, texts, base, len(texts)

    def loss(self, indices: Sequence[int]) -> Tensor:
        texts = [self.texts[i] for i in indices]
        losses: list[Tensor] = []
        for i, text, logits in zip(indices, texts, answer_logits(self.logits, texts), strict=True):
            if (base := self.base[i]) is None:
                losses.append(F.cross_entropy(logits[:-1], text.ids[text.start :].to(logits.device)))
            else:
                log_p = base.to(logits).log_softmax(-1)
                losses.append(F.kl_div(logits.log_softmax(-1), log_p, log_target=True, reduction="batchmean"))
        return torch.stack(losses).mean()


def answer_logits(logits: Logits, texts: Sequence[Text]) -> list[Tensor]:
    """Per text the logits ``(T - start + 1, vocabulary)`` from the last token of the prompt, float32."""
    return [row[text.start - 1 : len(text.ids)].float() for row, text in zip(logits(texts), texts, strict=True)]


def train_on_texts(
    attachment: Attachment,
    mixture: Mixture,
    texts: Sequence[Text],
    logits: Logits,
    settings: FitSettings,
    *,
    base: str = "",
    identity: str = "",
    folder: Path | None = None,
    devices: Devices | None = None,
    progress: Progress | None = None,
    keep: Callable[[TrainingResult], None] | None = None,
) -> TrainingResult:
    """Train gates for a mixture on a language model. The model and the LoRAs are not changed.

    Args:
        attachment: The mixture on the model. mixture: The same mixture.
        texts: Some for every LoRA; any number without a LoRA.
        logits: Runs the model.
        settings: Settings of the fit.
        base: The kind of model, for the gates' file.
        identity: Anything else that distinguishes this training from others.
        folder: Folder for the state, so that an interrupted training can be resumed; it is removed at the end.
        devices: See `fit`.
        progress: Called with (done, total, description). May raise an exception to cancel.
        keep: Called with the result so far if the training is interrupted.

    Raises:
        MergeError: A LoRA without texts, texts with nothing to predict, or values that are not finite.
        FormatError: `folder` holds another training.
    """
    _check(mixture, texts)
    record = {
        "settings": {"objective": "next-token", **settings.model_dump()},
        "texts": [sum(text.expert == i for text in texts) for i in (*range(len(mixture.experts)), None)],
    }
    run = TrainingRun(
        attachment, mixture, settings, record,
        base=base, identity=identity, folder=folder, devices=devices, progress=progress, keep=keep,
    )  # fmt: skip
    spans = [(text.start, text.expert, len(text.ids)) for text in texts]
    key = digest((text.ids for text in texts), json.dumps([run.description, spans]))
    run.check_folder(key)
    some = texts[:: -(-len(texts) // MEASURED_EXAMPLES)]  # evenly spaced, so that every LoRA has some

    def read_some() -> None:
        for i in range(0, len(some), settings.batch):
            logits(some[i : i + settings.batch])

    standardise_features(attachment, read_some)
    objective = NextToken(logits, texts, _base_logits(attachment, texts, logits, settings.batch))
    return run.fit(objective, key)


def _base_logits(attachment: Attachment, texts: Sequence[Text], logits: Logits, batch: int) -> list[Tensor | None]:
    """The base model's logits of the texts without a LoRA, on the CPU; ``None`` for the others."""
    base: list[Tensor | None] = []
    with torch.no_grad(), attachment.hold([0.0] * attachment.bank.experts):
        for i in range(0, len(texts), batch):
            part = texts[i : i + batch]
            without_lora = [text for text in part if text.expert is None]
            rows = iter(answer_logits(logits, without_lora) if without_lora else [])
            base += [next(rows).cpu() if text.expert is None else None for text in part]
    return base


def _check(mixture: Mixture, texts: Sequence[Text]) -> None:
    check_trainable(mixture)
    for i, label in enumerate(mixture.labels):
        if not any(text.expert == i for text in texts):
            raise MergeError(
                "A LoRA has no texts to learn from, so its gates would only learn to close.",
                file=label,
                expected="a few examples of what the LoRA is for",
                found="none",
            )
    for text in texts:
        if not 1 <= text.start < len(text.ids):
            raise MergeError(
                "An example has nothing to predict, or no prompt to predict it from.",
                expected="a prompt of at least one token, and at least one token after it",
                found=f"{text.start} and {len(text.ids) - text.start} tokens",
                remedy="give examples as (prompt, answer)",
            )
