"""The judge: a small classifier of subject and style, each with a class for "none of these"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .words import STYLES, SUBJECTS

FEATURES = 128


class Oracle(nn.Module):
    """Classify pictures ``(n, 3, 64, 64)`` in [-1, 1]: logits of S subjects ``(n, S + 1)`` and K styles ``(n, K + 1)``.

    The last class of each is "none of these". It was trained on blends, blurs and noise, so that unrecognisable
    pictures do not count as right.

    Args:
        subjects, styles: Names of the classes.
        widths: Channels of the four stages.
    """

    def __init__(
        self, subjects: Sequence[str] = SUBJECTS, styles: Sequence[str] = STYLES,
        widths: Sequence[int] = (24, 48, 96, FEATURES),
    ) -> None:  # fmt: skip
        super().__init__()
        self.subjects, self.styles = tuple(subjects), tuple(styles)
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise((3, *widths))):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            if i:
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.subject = nn.Linear(4 * widths[-1], len(subjects) + 1)
        self.style = nn.Linear(4 * widths[-1], len(styles) + 1)

    def features(self, pictures: Tensor) -> Tensor:
        """Return features ``(n, 4 widths[-1])``, used for the distance between sets of pictures."""
        return nn.functional.adaptive_avg_pool2d(self.body(pictures), 2).flatten(1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pictures)
        return self.subject(features), self.style(features)


@dataclass(frozen=True)
class Verdict:
    """Judgement of ``n`` pictures.

    Args:
        subject: Whether each picture shows the wanted subject, ``(n,)`` bool.
        style: Whether each picture shows the wanted style, ``(n,)`` bool.
        features: Features of the pictures, ``(n, 512)``.
    """

    subject: Tensor
    style: Tensor
    features: Tensor

    @property
    def both(self) -> Tensor:
        return self.subject & self.style


@torch.no_grad()
def judge(oracle: Oracle, pictures: Tensor, wanted: Sequence[tuple[str, str]]) -> Verdict:
    """Judge pictures ``(n, 3, 64, 64)`` in [-1, 1] that should show the `wanted` pairs of subject and style."""
    features = oracle.features(pictures)
    subjects = torch.tensor([oracle.subjects.index(subject) for subject, _ in wanted])
    styles = torch.tensor([oracle.styles.index(style) for _, style in wanted])
    return Verdict(oracle.subject(features).argmax(1) == subjects, oracle.style(features).argmax(1) == styles, features)
