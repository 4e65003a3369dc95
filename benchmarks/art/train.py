"""Train all models in stages; each finished stage is a file, from which an interrupted run resumes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from legomole.nano.store import Store
from safetensors.torch import load_file
from torch import Tensor

from ..common import Say
from ..nano import train_oracle, train_vae
from ..nano.train import resumable_base, stage
from . import model, packages, render
from .data import pictures, rendered
from .model import ArtStore
from .text import ArtPrompts
from .words import BASE_STYLES, BASE_SUBJECTS, STYLES, SUBJECTS


@dataclass(frozen=True)
class Size:
    """Amount of training; every number in a tuple is one round.

    Args:
        vae_steps, vae_renders: Steps per round, and renders per pair of subject and style.
        judge_steps, judge_renders: The same of the judge.
        base_steps, base_rates: Steps and highest learning rate of each round.
        base_renders: Renders per pair.
    """

    vae_steps: tuple[int, ...] = (1500, 1500)
    vae_renders: int = 3
    judge_steps: int = 5000
    judge_renders: int = 4
    base_steps: tuple[int, ...] = (4500,)
    base_rates: tuple[float, ...] = (1e-3, 7e-4, 5e-4)
    base_renders: int = 40
    base_batch: int = 32


SMOKE = Size((2,), 1, 2, 1, (2,), (1e-3,), 1, 4)
_VAE_RATES = (1.5e-3, 1e-3, 7e-4)
_SHOWN = [pair for pair in itertools.product(BASE_SUBJECTS, BASE_STYLES) if not render.never_shown(*pair)]
"""Pairs in the pictures of the base model."""


def data(store: ArtStore) -> None:
    """Download the packages and rasterise the drawings."""
    store.folder.mkdir(parents=True, exist_ok=True)
    if not store.drawings_file.exists():
        packages.fetch(store.packages)
        render.draw_all(store.packages, store.drawings_file)


def train(store: ArtStore, size: Size, say: Say) -> None:
    """Train autoencoder, judge and base model."""
    began = time.monotonic()

    def timed(text: str) -> None:
        say(f"[{time.monotonic() - began:6.0f} s] {text}")

    data(store)
    stage(store.folder / "vae.safetensors", timed, lambda: _vae(store, size, timed))
    stage(store.folder / "oracle.safetensors", timed, lambda: _judge(store, size, timed))
    stage(store.folder / "base.safetensors", timed, lambda: _base(store, size, timed))


def bfloat16() -> torch.autocast:
    """Compute in bfloat16, without the cache of weights, which would hold those of the first step."""
    return torch.autocast("cpu", torch.bfloat16, cache_enabled=False)


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


def _vae(store: ArtStore, size: Size, say: Say) -> Mapping[str, Tensor]:
    raw = rendered(store.drawings, list(itertools.product(SUBJECTS, STYLES)), size.vae_renders, 5)

    def round_of(i: int) -> Callable[[Any], Any]:
        return lambda weights: train_vae.fit(
            raw, size.vae_steps[i], seed=i, initial=weights, lr=_VAE_RATES[i], say=say
        )

    # the nano model's knows edges and flat areas already
    return _rounds(store, "vae", [round_of(i) for i in range(len(size.vae_steps))], Store().vae.state_dict(), say)


def _judge(store: ArtStore, size: Size, say: Say) -> Mapping[str, Tensor]:
    torch.manual_seed(1)
    judge, pairs = model.build_judge(), list(itertools.product(SUBJECTS, STYLES))
    raw = rendered(store.drawings, pairs, size.judge_renders, 1)
    examples = train_oracle.examples(judge, store.vae, raw, size.judge_renders)
    train_oracle.fit(judge, *examples, size.judge_steps, say=say)
    fresh = rendered(store.drawings, pairs, 1, 99).float() / 127.5 - 1
    with torch.no_grad():
        decoded = store.pictures(torch.cat([store.vae.encoder(part) for part in fresh.split(64)]))
    for name, x in (("renders", fresh), ("reconstructions", decoded)):
        subject, style = train_oracle.accuracy(judge, x, 1)
        say(f"judge on fresh {name}: subject {subject:.3f} style {style:.3f}")
    return judge.state_dict()


def _base(store: ArtStore, size: Size, say: Say) -> Mapping[str, Tensor]:
    shown = pictures(store.vae, store.drawings, _SHOWN, size.base_renders, 10)

    def round_of(i: int) -> Callable[[Any], Any]:
        return lambda weights: resumable_base(
            store.folder / f"base-{i}.state", shown, size.base_steps[i], batch=size.base_batch,
            lr=size.base_rates[i], seed=i, initial=weights, prompts=ArtPrompts(short=True), architecture=model.build,
            say=say,
        )  # fmt: skip

    return _rounds(store, "base", [round_of(i) for i in range(len(size.base_steps))], None, say)
