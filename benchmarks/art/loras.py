"""Train LoRAs independently: each on its own few pictures, from its own seed, in the habits of different trainers."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace

import numpy as np
from legomole.core.adapter import Adapter
from legomole.core.formats import save
from legomole.core.lowrank import LowRank

from ..common import Say, bfloat16, spiked
from ..nano import train_loras
from .data import JITTER, Pair, Pictures, pictures
from .model import ArtStore
from .text import ArtPrompts
from .words import BASE_STYLES, BASE_SUBJECTS, LORA_SUBJECTS, NEW_STYLES

CONCEPTS = (*LORA_SUBJECTS, *NEW_STYLES)
_SPIKE = 3.0  # factor on the largest singular value of each layer


@dataclass(frozen=True)
class Habit:
    """How a LoRA is trained.

    Args:
        rank: Rank of every layer.
        layers: Names of the layers.
        alpha: Scale of the update; the factors are divided by it, which leaves the update as trained.
        prior: Whether half of the pictures are of base subjects in base styles (prior preservation).
        longer: Factor on the number of steps.
        spike: Whether the largest singular value of each layer is multiplied by 3.
    """

    rank: int
    layers: tuple[str, ...] = train_loras.TARGETS
    alpha: float | None = None
    prior: bool = False
    longer: int = 1
    spike: bool = False


_OVERCOOKED = ("rocket", "neon")
_SPIKED = "owl"


def habit(concept: str) -> Habit:
    """Return the habit of a LoRA: ranks 4, 8 and 16 and the others' in turn, and a few that went wrong."""
    i = CONCEPTS.index(concept)
    usual = Habit((4, 8, 16)[i % 3])
    if i % 4 == 1:
        usual = replace(usual, prior=True)
    elif i % 4 == 3:  # as kohya's scripts by default: attention only, alpha 1
        usual = replace(usual, layers=train_loras.ATTENTION, alpha=1.0)
    return replace(usual, longer=2 if concept in _OVERCOOKED else 1, spike=concept == _SPIKED)


def pairs_of(concept: str) -> list[Pair]:
    """Return what a LoRA's pictures show: its subject in four base styles twice, or its style on eight subjects."""
    rng = np.random.default_rng(CONCEPTS.index(concept))
    if concept in LORA_SUBJECTS:
        return [(concept, str(k)) for k in rng.choice(BASE_STYLES, 4, replace=False)] * 2
    return [(str(s), concept) for s in rng.choice(BASE_SUBJECTS, 8, replace=False)]


def lora_pictures(store: ArtStore, concept: str) -> Pictures:
    """Render the pictures of a LoRA, with as many of base subjects if its habit is prior preservation."""
    seed = 100 + CONCEPTS.index(concept)
    own = pictures(store.vae, store.drawings, pairs_of(concept), 1, seed, jitter=JITTER)
    if not habit(concept).prior:
        return own
    rng = np.random.default_rng(seed)
    others = list(itertools.product(BASE_SUBJECTS, BASE_STYLES))
    chosen = [others[i] for i in rng.choice(len(others), len(own.shows), replace=False)]
    return own + pictures(store.vae, store.drawings, chosen, 1, seed, jitter=JITTER)


def train(store: ArtStore, concept: str, steps: int, batch: int, say: Say) -> None:
    """Train a LoRA, unless its file exists."""
    path, how = store.lora(concept, 0), habit(concept)
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with bfloat16():
        lora = train_loras.train(
            store.transformer, lora_pictures(store, concept), ArtPrompts(short=True), steps=how.longer * steps,
            seed=CONCEPTS.index(concept), rank=how.rank, batch=batch, targets=how.layers, say=say,
        )  # fmt: skip
    lora = Adapter({name: finished(part, how) for name, part in lora.modules.items()})
    save(lora, path, format="diffusers")


def finished(part: LowRank, how: Habit) -> LowRank:
    part = spiked(part, _SPIKE) if how.spike else part
    A, B = part.A.float(), part.B.float()
    if how.alpha is not None:
        B = B * (how.rank / how.alpha)
    return LowRank(A.half().contiguous(), B.half().contiguous(), how.alpha)
