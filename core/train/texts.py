"""Train the gates of a language model: its own loss on a few texts per LoRA."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ..digest import digest
from ..errors import MergeError
from ..mole.attach import Attachment
from ..mole.mixture import Mixture
from ..mole.trained import Expert
from ..progress import Progress
from .features import standardise_features
from .fit import Devices, read_state
from .learn import TrainingResult, check_trainable, learn
from .settings import FitSettings

_CALIBRATED_ON = 64  # texts


@dataclass(frozen=True, eq=False)
class Text:
    """A text to learn from: a prompt, and how it goes on.

    Args:
        ids: ``(T,)`` long, token ids.
        start: The first token to be predicted, 1 .. T - 1. Those before are the prompt, which the gates of a text read.
        expert: Position of the LoRA it is for; ``None`` for a text on which all should stay as it is without LoRAs.
    """

    ids: Tensor
    start: int
    expert: int | None = None


# The gated model: texts to logits ``(B, T, vocabulary)``, in the order of their tokens; anything after a text's end.
Logits = Callable[[Sequence[Text]], Tensor]


class NextToken:
    """The language model loss on the texts of LoRAs, and staying near the base model on the others.

    Every text counts alike, whatever its length.

    Args:
        logits: The gated model.
        texts: What to learn from.
        base: For the texts of no LoRA, the base model's logits ``(T - start + 1, vocabulary)`` from the last token of
            the prompt on; ``None`` for the rest. The loss there is the Kullback-Leibler divergence from them.
    """

    def __init__(self, logits: Logits, texts: Sequence[Text], base: Sequence[Tensor | None]) -> None:
        self.logits, self.texts, self.base, self.size = logits, texts, base, len(texts)

    def loss(self, indices: Sequence[int]) -> Tensor:
        texts = [self.texts[i] for i in indices]
        losses: list[Tensor] = []
        for i, text, found in zip(indices, texts, answers(self.logits, texts), strict=True):
            if (wanted := self.base[i]) is None:
                losses.append(F.cross_entropy(found[:-1], text.ids[text.start :].to(found.device)))
            else:
                log_p = wanted.to(found).log_softmax(-1)
                losses.append(F.kl_div(found.log_softmax(-1), log_p, log_target=True, reduction="batchmean"))
        return torch.stack(losses).mean()


def answers(logits: Logits, texts: Sequence[Text]) -> list[Tensor]:
    """Per text the logits ``(T - start + 1, vocabulary)`` from the last token of the prompt on, float32."""
    found = logits(texts)
    return [row[text.start - 1 : len(text.ids)].float() for row, text in zip(found, texts, strict=True)]


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
        texts: Some for every LoRA, and any for none.
        logits: Runs the model.
        settings: How to train.
        base: The kind of model, for the gates' file. identity: What else tells this training from others.
        folder: Where the state is kept, so that an interrupted training goes on where it was. It is emptied at the end.
        devices: See `fit`.
        progress: Called with (done, in all, what is going on). May raise to cancel.
        keep: Called with what was learnt so far when the training is interrupted.

    Raises:
        MergeError: A LoRA without texts, texts that cannot be learnt from, or numbers that are not finite.
        FormatError: `folder` holds another training.
    """
    _check(mixture, texts)
    experts = tuple(Expert.of(adapter) for adapter in mixture.experts)
    record = {
        "settings": {"objective": "next-token", **settings.model_dump()},
        "texts": [sum(text.expert == i for text in texts) for i in (*range(len(experts)), None)],
        "strengths": [strength * mixture.scale for strength in mixture.strengths],
    }
    described = [
        record,
        [e.sha256 for e in experts],
        mixture.gates.settings.model_dump(),
        mixture.mixing,
        base,
        identity,
    ]
    places = [(text.start, text.expert, len(text.ids)) for text in texts]
    key = digest((text.ids for text in texts), json.dumps([described, places]))
    if folder is not None:
        read_state(folder, key)  # another training's folder is refused at once
    parts = [texts[i : i + settings.batch] for i in range(0, len(texts), settings.batch)]
    some = texts[:: -(-len(texts) // _CALIBRATED_ON)]  # of every LoRA

    def show() -> None:
        for i in range(0, len(some), settings.batch):
            logits(some[i : i + settings.batch])

    standardise_features(attachment, show)
    wanted: list[Tensor | None] = []
    with torch.no_grad(), attachment.hold([0.0] * len(experts)):
        for part in parts:
            others = [text for text in part if text.expert is None]
            found = iter(answers(logits, others) if others else [])
            wanted += [next(found).cpu() if text.expert is None else None for text in part]
    return learn(
        attachment, NextToken(logits, texts, wanted), settings,
        partial(TrainingResult.of, experts=experts, base=base, record=record),
        key=key, folder=folder, devices=devices, progress=progress, keep=keep,
    )  # fmt: skip


def _check(mixture: Mixture, texts: Sequence[Text]) -> None:
    check_trainable(mixture)
    for i, label in enumerate(mixture.labels):
        if not any(text.expert == i for text in texts):
            raise MergeError(
                "A LoRA has no texts to learn from, so its gates would only learn to shut.",
                file=label,
                expected="a few examples of what the LoRA is for",
                found="none",
            )
    for text in texts:
        if not 1 <= text.start < len(text.ids):
            raise MergeError(
                "An example has nothing to predict, or nothing to predict it from.",
                expected="a prompt of at least one token, and at least one token after it",
                found=f"{text.start} and {len(text.ids) - text.start} tokens",
                remedy="give examples as (prompt, answer)",
            )
