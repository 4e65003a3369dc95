"""The judge: a small network that reads subject and style from a picture, or says that it sees neither."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from .words import STYLES, SUBJECTS

FEATURES = 128


class Oracle(nn.Module):
    """Pictures ``(n, 3, 64, 64)`` in [-1, 1] -> subject logits ``(n, 17)`` and style logits ``(n, 13)``.

    The last class of each is "none of these": it was trained on blends, blurs and noise, so that mush does not score.
    """

    def __init__(self) -> None:
        super().__init__()
        widths = (3, 24, 48, 96, FEATURES)
        layers: list[nn.Module] = []
        for i, (before, width) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(before, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
            if i:
                layers += [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.SiLU()]
        self.body = nn.Sequential(*layers)
        self.subject = nn.Linear(4 * FEATURES, len(SUBJECTS) + 1)
        self.style = nn.Linear(4 * FEATURES, len(STYLES) + 1)

    def features(self, pictures: Tensor) -> Tensor:
        """``(n, 512)``, what the distance between sets of pictures is measured in."""
        return nn.functional.adaptive_avg_pool2d(self.body(pictures), 2).flatten(1)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        features = self.features(pictures)
        return self.subject(features), self.style(features)


@dataclass(frozen=True)
class Verdict:
    """Per picture: is the subject the wanted one, is the style; and the features."""

    subject: Tensor
    style: Tensor
    features: Tensor

    @property
    def both(self) -> Tensor:
        return self.subject & self.style


@torch.no_grad()
def judge(oracle: Oracle, pictures: Tensor, wanted: Sequence[tuple[str, str]]) -> Verdict:
    """What the oracle says of pictures ``(n, 3, 64, 64)`` in [-1, 1] that should show `wanted` (subject, style)."""
    features = oracle.features(pictures)
    subjects = torch.tensor([SUBJECTS.index(subject) for subject, _ in wanted])
    styles = torch.tensor([STYLES.index(style) for _, style in wanted])
    return Verdict(oracle.subject(features).argmax(1) == subjects, oracle.style(features).argmax(1) == styles, features)
