"""Sample scenes and judge each half with the nano model's judge."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from legomole.nano.model import short_prompts
from legomole.nano.sampling import sample
from legomole.nano.store import Store
from legomole.nano.words import STYLES, SUBJECTS
from torch import Tensor

from .methods import RegionPasses, Request
from .scenes import SIDES, WIDTH, Scene


@dataclass(frozen=True)
class Verdict:
    """Judgement of the halves of ``n`` pictures.

    Args:
        subjects, styles: Class of each half, ``(n, 2)``, see `judge`.
    """

    subjects: Tensor
    styles: Tensor

    def subject_right(self, scenes: Sequence[Scene]) -> Tensor:
        """Return whether each half shows its subject, ``(n, 2)`` bool."""
        return self.subjects == torch.tensor([[SUBJECTS.index(getattr(s, side)) for side in SIDES] for s in scenes])

    def right(self, scenes: Sequence[Scene]) -> Tensor:
        """Return whether each half shows its subject in the style of the scene, ``(n, 2)`` bool."""
        return self.subject_right(scenes) & (self.styles == torch.tensor([[STYLES.index(s.style)] for s in scenes]))

    def shows(self, subject: str) -> Tensor:
        """Return whether each half shows a subject, ``(n, 2)`` bool."""
        return self.subjects == SUBJECTS.index(subject)


@torch.no_grad()
def judged(store: Store, pictures: Tensor) -> Verdict:
    """Judge both halves of pictures ``(n, 3, 64, 128)`` in [-1, 1]."""
    halves = torch.stack(pictures.chunk(2, dim=3), 1)
    subject, style = store.oracle(halves.flatten(0, 1))
    return Verdict(subject.argmax(1).unflatten(0, (-1, 2)), style.argmax(1).unflatten(0, (-1, 2)))


def sampled(store: Store, model: Any, request: Request, seed: int) -> Tensor:
    """Sample pictures ``(n, 3, 64, 128)`` in [-1, 1]."""
    transformers = model.models if isinstance(model, RegionPasses) else [model]
    channels = transformers[0].config.in_channels
    with ExitStack() as stack:
        if request.encoder.short:
            for transformer in transformers:
                stack.enter_context(short_prompts(transformer, request.encoder.tokens))
        latents = sample(model, request.encoder, request.texts, seed, width=WIDTH, channels=channels)
    with torch.autocast("cpu", enabled=False):
        return store.pictures(latents.float())
