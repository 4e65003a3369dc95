"""The judge of half pictures: the nano model's, fine-tuned to tell mixtures of two subjects from everything else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from legomole.nano.oracle import FEATURES, Oracle
from legomole.nano.store import Store
from legomole.nano.words import STYLES, SUBJECTS
from numpy.typing import NDArray
from torch import Tensor, nn

from ..common import Say
from ..nano.data import encoded
from ..nano.render import BASE_STYLES, paint
from ..nano.train_oracle import fit
from .scenes import side_shape

NONE, MIXTURE = len(SUBJECTS), len(SUBJECTS) + 1  # classes after the subjects
_LR = 1e-3


def build() -> Oracle:
    """Build an untrained judge, whose last class of subjects is "a mixture of two"."""
    judge = Oracle()
    judge.subject = nn.Linear(4 * FEATURES, MIXTURE + 1)
    return judge


@dataclass(frozen=True)
class Squares:
    """Decoded squares ``(n, 3, 64, 64)`` in [-1, 1] with their classes ``(n,)``; a style of -1 is not judged."""

    pictures: Tensor
    subject: Tensor
    style: Tensor


def squares(nano: Store, times: int, seed: int) -> Squares:
    """Render labelled squares: `times` of each subject in each base style, half as many mixtures, and some of none.

    Mixtures are of two subjects in the same style, in equal parts: the union of both shapes, one shape above or beside
    the other's rest, and a blend of their latents.
    """
    rng = np.random.default_rng(seed)
    plain: list[NDArray[np.uint8]] = []
    mixed: list[NDArray[np.uint8]] = []
    empty: list[NDArray[np.uint8]] = []
    labels: list[tuple[int, int]] = []
    looks: list[int] = []
    for style in BASE_STYLES:
        k = STYLES.index(style)
        for i, subject in enumerate(SUBJECTS):
            for _ in range(times):
                plain.append(paint(side_shape(subject, rng), style, rng))
                labels.append((i, k))
        for n in range(times * len(SUBJECTS) // 3):
            a, b = rng.choice(len(SUBJECTS), 2, replace=False)
            first, second = side_shape(SUBJECTS[a], rng), side_shape(SUBJECTS[b], rng)
            side = np.arange(len(first)) < rng.uniform(0.42, 0.58) * len(first)
            cut = side[:, None] if rng.random() < 0.5 else side[None, :]
            mixed.append(paint(np.maximum(first, second) if n % 2 else np.where(cut, first, second), style, rng))
            looks.append(k)
        for _ in range(2 * times):
            empty.append(paint(side_shape("", rng), style, rng))
    z = encoded(nano.vae, plain)
    subject, style = torch.tensor(labels).T
    generator = torch.Generator().manual_seed(seed)
    i = torch.randperm(len(z), generator=generator)
    j = i.roll(1)
    keep = ((subject[i] != subject[j]).nonzero()[:, 0])[: len(mixed) // 2]
    i, j = i[keep], j[keep]
    w = torch.empty(len(i), 1, 1, 1).uniform_(0.4, 0.6, generator=generator)
    shuffled = z[i[: len(empty)]].flatten(2)[..., torch.randperm(z[0, 0].numel(), generator=generator)]
    nothing = torch.cat([encoded(nano.vae, empty), shuffled.unflatten(2, z.shape[2:])])
    parts = [
        (z, subject, style),
        (encoded(nano.vae, mixed), _full(mixed, MIXTURE), torch.tensor(looks)),
        (w * z[i] + (1 - w) * z[j], _full(i, MIXTURE), _full(i, -1)),
        (nothing, _full(nothing, NONE), _full(nothing, -1)),
    ]
    latents, subjects, styles = (torch.cat(column) for column in zip(*parts, strict=True))
    latents = latents + 0.2 * torch.rand(len(latents), 1, 1, 1, generator=generator) * torch.randn(
        latents.shape, generator=generator
    )
    return Squares(nano.pictures(latents), subjects, styles)


def _full(of: Sequence[object] | Tensor, label: int) -> Tensor:
    return torch.full((len(of),), label)


def train(nano: Store, steps: int, times: int, say: Say = print) -> Oracle:
    """Fine-tune the nano model's judge on `squares`."""
    torch.manual_seed(3)
    judge, state = build(), nano.oracle.state_dict()
    head = {name: state.pop(f"subject.{name}") for name in ("weight", "bias")}
    judge.load_state_dict(state, strict=False)
    with torch.no_grad():
        judge.subject.weight[:MIXTURE], judge.subject.bias[:MIXTURE] = head["weight"], head["bias"]
    data = squares(nano, times, 31)
    return fit(judge, data.pictures, data.subject, data.style, steps, lr=_LR, say=say)


@torch.no_grad()
def accuracy(judge: Oracle, data: Squares) -> dict[str, float]:
    """Return the accuracy on subjects, on styles, and the shares of mixtures and of nothing that are found."""
    subject, style = (torch.cat(logits).argmax(1) for logits in zip(*map(judge, data.pictures.split(64)), strict=True))
    right = (subject == data.subject).float()
    of_subject, styled = data.subject < NONE, data.style >= 0
    return {
        "subject": right[of_subject].mean().item(),
        "style": (style == data.style)[styled].float().mean().item(),
        "mixture": right[data.subject == MIXTURE].mean().item(),
        "none": right[data.subject == NONE].mean().item(),
        "subjects called mixtures": (subject == MIXTURE)[of_subject].float().mean().item(),
    }
