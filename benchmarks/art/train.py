"""Train all models in stages; each finished stage is a file, from which an interrupted run resumes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from legomole.core.formats.files import write_tensors
from safetensors.torch import load_file
from torch import Tensor

from ..common import Say, bfloat16
from ..nano import train_oracle
from ..nano.train import resumable_base, stage
from ..processes import apart, is_first, together
from ..regions.train import widened
from . import loras, model, packages, render, vae
from .data import JITTER, pictures, rendered, scenes
from .model import ArtStore
from .text import ArtPrompts
from .words import BASE_STYLES, BASE_SUBJECTS, HAND_STYLES, NEW_STYLES, STYLES, SUBJECTS


@dataclass(frozen=True)
class Round:
    """A round of the base model's training.

    Args:
        steps: Number of steps. rate: Highest learning rate.
        treated: Whether it shows all base styles; otherwise only the coloured drawings.
    """

    steps: int
    rate: float
    treated: bool = False


@dataclass(frozen=True)
class Size:
    """Amount of training.

    Args:
        judge_steps, judge_renders: Steps, and renders per pair of subject and style.
        base: Rounds of the base model.
        base_renders: Renders per pair, half as many with all styles. base_batch: Pictures per step.
        wide_steps: Steps of the fine-tuning on scenes.
        lora_steps, lora_batch: Steps and pictures per step of the LoRAs of these `concepts`.
    """

    judge_steps: int = 3500
    judge_renders: int = 4
    base: tuple[Round, ...] = (Round(5500, 1e-3), Round(4000, 8e-4, treated=True))
    base_renders: int = 40
    base_batch: int = 32
    wide_steps: int = 2500
    lora_steps: int = 200
    lora_batch: int = 8
    concepts: tuple[str, ...] = loras.CONCEPTS


SMOKE = Size(4, 1, (Round(4, 1e-3), Round(4, 1e-3, treated=True)), 1, 4, 4, 12, 4, ("fox", "neon"))
_SHOWN = [pair for pair in itertools.product(BASE_SUBJECTS, BASE_STYLES) if not render.never_shown(*pair)]
"""Pairs in the pictures of the base model."""
_FITTED = (*HAND_STYLES, "ink", *(style for style in NEW_STYLES if style != "negative"))
"""Styles that the autoencoder is fitted to; the patches of the others are recolourings of these."""


def data(store: ArtStore) -> None:
    """Download the packages and rasterise the drawings."""
    store.folder.mkdir(parents=True, exist_ok=True)
    if not store.drawings_file.exists():
        packages.fetch(store.packages)
        render.draw_all(store.packages, store.drawings_file)


@dataclass(frozen=True)
class _Run:
    """A training, its stages picklable for other processes."""

    folder: Path
    size: Size
    say: Say
    began: float

    def timed(self, text: str) -> None:
        self.say(f"[{time.monotonic() - self.began:6.0f} s] {text}")

    def base(self) -> None:
        store = ArtStore(self.folder)
        say = self.timed if is_first() else _silent
        stage(self.folder / "base.safetensors", say, lambda: _base(store, self.size, say))
        stage(self.folder / "wide.safetensors", say, lambda: _wide(store, self.size, say))

    def other(self, concept: str | None) -> None:
        """Train the LoRA of a concept, or the judge for None."""
        store = ArtStore(self.folder)
        if concept is None:
            stage(self.folder / "oracle.safetensors", self.timed, lambda: _judge(store, self.size, self.timed))
        else:
            loras.train(store, concept, self.size.lora_steps, self.size.lora_batch, self.timed)


def train(store: ArtStore, size: Size, say: Say, processes: int = 1) -> None:
    """Train autoencoder, base model, its copy for scenes, judge and LoRAs; `processes` change the time only."""
    data(store)
    _vae(store)
    run = _Run(store.folder, size, say, time.monotonic())
    # every process gets as many pictures of a batch, also of scenes, of which a batch has half as many
    together(math.gcd(processes, size.base_batch // 2), run.base)
    apart(processes, run.other, [None, *size.concepts])


def _silent(_: str) -> None:
    pass


def _vae(store: ArtStore) -> None:
    path = store.folder / "vae.safetensors"
    if not path.exists():
        pairs = list(itertools.product(SUBJECTS, _FITTED))
        write_tensors(path, vae.fit(rendered(store.drawings, pairs, 1, 5)), {})


def _judge(store: ArtStore, size: Size, say: Say) -> Mapping[str, Tensor]:
    torch.manual_seed(1)
    judge, pairs = model.build_judge(), list(itertools.product(SUBJECTS, STYLES))
    raw = rendered(store.drawings, pairs, size.judge_renders, 1)
    # samples have seams between patches, which this noise resembles
    examples = train_oracle.examples(judge, store.vae, raw, size.judge_renders, noise=0.8)
    with bfloat16():
        train_oracle.fit(judge, *examples, size.judge_steps, say=say)
    fresh = rendered(store.drawings, pairs, 1, 99).float() / 127.5 - 1
    with torch.no_grad():
        decoded = store.pictures(torch.cat([store.vae.encoder(part) for part in fresh.split(64)]))
    for name, x in (("renders", fresh), ("reconstructions", decoded)):
        subject, style = train_oracle.accuracy(judge, x, 1)
        say(f"judge on fresh {name}: subject {subject:.3f} style {style:.3f}")
    return judge.state_dict()


def _base(store: ArtStore, size: Size, say: Say) -> Mapping[str, Tensor]:
    """Train in rounds, each from the weights of the one before; finished rounds are files."""
    weights: Mapping[str, Tensor] | None = None
    for i, part in enumerate(size.base):
        path = store.folder / f"base-{i}.safetensors"
        make = partial(_round, store, size, part, i, weights, say)
        with bfloat16():
            stage(path, say, make)
        weights = {key: tensor.float() for key, tensor in load_file(path).items()}
    assert weights is not None
    return weights


def _round(
    store: ArtStore, size: Size, part: Round, seed: int, initial: Mapping[str, Tensor] | None, say: Say
) -> Mapping[str, Tensor]:
    pairs = _SHOWN if part.treated else [pair for pair in _SHOWN if pair[1] in HAND_STYLES]
    renders = size.base_renders // 2 if part.treated else size.base_renders
    shown = pictures(store.vae, store.drawings, pairs, max(renders, 1), 10, jitter=JITTER)
    return resumable_base(
        store.folder / f"base-{seed}.state", shown, part.steps, batch=size.base_batch, lr=part.rate, seed=seed,
        initial=initial, prompts=ArtPrompts(short=True), architecture=model.build, say=say,
    )  # fmt: skip


_WIDE_RATE, _SCENES_PER_STEP = 7e-4, 4


def _wide(store: ArtStore, size: Size, say: Say) -> Mapping[str, Tensor]:
    """Fine-tune the base model on scenes, with positions that make both halves look like a picture."""
    count = max(_SCENES_PER_STEP * size.wide_steps, 3)
    shown = scenes(store.vae, store.drawings, BASE_SUBJECTS, BASE_STYLES, count, 11, jitter=JITTER)
    with bfloat16():
        return resumable_base(
            store.folder / "wide.state", shown, size.wide_steps, batch=size.base_batch, lr=_WIDE_RATE, seed=9,
            initial=widened(store.transformer.state_dict()), prompts=ArtPrompts(short=True), architecture=model.build,
            say=say,
        )  # fmt: skip
