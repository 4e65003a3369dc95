"""Train all models in stages; each finished stage is a file, from which an interrupted run resumes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from legomole.core.formats.files import write_tensors
from safetensors.torch import load_file
from torch import Tensor

from ..common import Say
from ..nano import train_oracle
from ..nano.train import resumable_base, stage
from . import loras, model, packages, render, vae
from .data import JITTER, pictures, rendered
from .model import ArtStore, bfloat16
from .text import ArtPrompts
from .words import BASE_STYLES, BASE_SUBJECTS, STYLES, SUBJECTS


@dataclass(frozen=True)
class Size:
    """Amount of training; every number in a tuple is one round.

    Args:
        judge_steps, judge_renders: Steps, and renders per pair of subject and style.
        base_steps, base_rates: Steps and highest learning rate of each round.
        base_renders: Renders per pair. base_batch: Pictures per step.
        lora_steps, lora_batch: Steps and pictures per step of the LoRAs of these `concepts`.
    """

    judge_steps: int = 3500
    judge_renders: int = 4
    base_steps: tuple[int, ...] = (4000, 2500)
    base_rates: tuple[float, ...] = (1e-3, 7e-4)
    base_renders: int = 40
    base_batch: int = 32
    lora_steps: int = 300
    lora_batch: int = 8
    concepts: tuple[str, ...] = loras.CONCEPTS


SMOKE = Size(4, 1, (4,), (1e-3,), 1, 4, 12, 4, ("fox", "ink"))
_SHOWN = [pair for pair in itertools.product(BASE_SUBJECTS, BASE_STYLES) if not render.never_shown(*pair)]
"""Pairs in the pictures of the base model."""


def data(store: ArtStore) -> None:
    """Download the packages and rasterise the drawings."""
    store.folder.mkdir(parents=True, exist_ok=True)
    if not store.drawings_file.exists():
        packages.fetch(store.packages)
        render.draw_all(store.packages, store.drawings_file)


def train(store: ArtStore, size: Size, say: Say) -> None:
    """Train autoencoder, base model, judge and LoRAs."""
    began = time.monotonic()

    def timed(text: str) -> None:
        say(f"[{time.monotonic() - began:6.0f} s] {text}")

    data(store)
    _vae(store)
    stage(store.folder / "base.safetensors", timed, lambda: _base(store, size, timed))
    stage(store.folder / "oracle.safetensors", timed, lambda: _judge(store, size, timed))
    loras.train(store, size.lora_steps, size.lora_batch, timed, size.concepts)


def _rounds(
    store: ArtStore, name: str, makers: list[Callable[[Mapping[str, Tensor] | None], Mapping[str, Tensor]]],
    initial: Mapping[str, Tensor] | None, say: Say,
) -> Mapping[str, Tensor]:  # fmt: skip
    """Train in rounds, each from the weights of the one before; finished rounds are files."""
    weights = initial
    for i, make in enumerate(makers):
        path = store.folder / f"{name}-{i}.safetensors"
        with bfloat16():
            stage(path, say, partial(make, weights))
        weights = {key: tensor.float() for key, tensor in load_file(path).items()}
    assert weights is not None
    return weights


def _vae(store: ArtStore) -> None:
    path = store.folder / "vae.safetensors"
    if not path.exists():
        pairs = list(itertools.product(SUBJECTS, STYLES))
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
    shown = pictures(store.vae, store.drawings, _SHOWN, size.base_renders, 10, jitter=JITTER)

    def round_of(i: int) -> Callable[[Any], Any]:
        return lambda weights: resumable_base(
            store.folder / f"base-{i}.state", shown, size.base_steps[i], batch=size.base_batch,
            lr=size.base_rates[i], seed=i, initial=weights, prompts=ArtPrompts(short=True), architecture=model.build,
            say=say,
        )  # fmt: skip

    return _rounds(store, "base", [round_of(i) for i in range(len(size.base_steps))], None, say)
