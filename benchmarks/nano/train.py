"""Train all models in stages; each finished stage is a file, from which an interrupted run resumes."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from legomole.core.formats import save
from legomole.core.formats.files import write_tensors
from legomole.core.mole.gates import GateSettings
from legomole.nano.comfyui import CONCEPTS
from legomole.nano.demo import STYLE, SUBJECT
from legomole.nano.model import Prompts
from legomole.nano.store import Store
from torch import Tensor

from ..common import Say
from ..processes import is_first, wait
from . import train_base, train_loras, train_oracle, train_vae
from .data import Captioned, Examples, examples
from .evaluate import SCORED
from .methods import LONG, LoraSet, trained_gates
from .render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS

SEEDS = (0, 1, 2)
LORAS = (*CONCEPTS, "bolt")  # the demo does without the last


@dataclass(frozen=True)
class Size:
    """Amount of training; the defaults are those of the shipped weights."""

    vae_steps: int = 3000
    vae_renders: int = 8
    base_steps: int = 4500
    base_renders: int = 48
    base_batch: int = 32
    oracle_steps: int = 1500
    oracle_renders: int = 16
    lora_steps: int = 300
    seeds: tuple[int, ...] = SEEDS
    device: str = "cpu"

    def longer(self, times: float) -> Size:
        """Return a size with `times` as many steps and pictures."""
        scaled = [f.name for f in fields(self) if f.name.endswith(("steps", "renders"))]
        return replace(self, **{name: max(1, round(times * getattr(self, name))) for name in scaled})


SMOKE = Size(12, 1, 30, 1, 16, 10, 1, 6, (0,))


def train(work: Path, size: Size, say: Say) -> Store:
    """Train autoencoder, judge, base model and LoRAs; return the store in `work`."""
    began = time.monotonic()

    def timed(text: str) -> None:
        say(f"[{time.monotonic() - began:6.0f} s] {text}")

    (work / "loras").mkdir(parents=True, exist_ok=True)
    store = Store(work)
    stage(work / "vae.safetensors", timed, lambda: _vae(size, timed))
    stage(work / "oracle.safetensors", timed, lambda: _oracle(store, size, timed))
    stage(work / "base.safetensors", timed, lambda: _base(store, work, size, timed))
    prompts = Prompts(short=True)
    for seed, concept in itertools.product(size.seeds, LORAS):
        _lora(store, prompts, concept, seed, size, timed)
    return store


def train_jointly(store: Store, size: Size, say: Say) -> None:
    """Train the upper bound: for each scored pair a LoRA of twice the rank, on pictures of both concepts together."""
    prompts = Prompts(short=True)
    for seed, pair in itertools.product(size.seeds[:1], SCORED):
        path = store.lora("+".join(pair), seed)
        if not path.exists():
            together = examples(store.vae, [pair], 24, seed + 50, jitter=0.5)
            data = lora_data(store.vae, pair[0], seed) + lora_data(store.vae, pair[1], seed) + together
            lora = train_loras.train(
                store.transformer, data, prompts, steps=size.lora_steps, seed=seed, rank=2 * train_loras.RANK,
                say=say, device=size.device,
            )  # fmt: skip
            save(lora, path, format="diffusers")


def lora_data(vae: Any, concept: str, seed: int) -> Examples:
    """Render a concept's pictures, 3 styles x 8 or 4 subjects x 6; every second LoRA has the author's habit."""
    subject = concept in NEW_SUBJECTS
    author = (LORAS.index(concept) + seed) % 2 == 0
    pairs = train_loras.pairs_of(concept, seed)
    return examples(vae, pairs, 8 if subject else 6, 100 + seed, jitter=0.5, author=author)


def _lora(store: Store, prompts: Prompts, concept: str, seed: int, size: Size, say: Say) -> None:
    path = store.lora(concept, seed)
    if not path.exists():
        data = lora_data(store.vae, concept, seed)
        start = 100 * seed + LORAS.index(concept)
        lora = train_loras.train(
            store.transformer, data, prompts, steps=size.lora_steps, seed=start, say=say, device=size.device
        )
        save(lora, path, format="diffusers")


def stage(path: Path, say: Say, make: Callable[[], Mapping[str, Tensor]]) -> None:
    """Write the tensors of a stage in float16, unless it was finished earlier; the first process writes."""
    if path.exists():
        say(f"{path.stem}: finished earlier")
        return
    tensors = make()
    if is_first():
        write_tensors(path, {name: tensor.half().contiguous() for name, tensor in tensors.items()}, {})
    wait()
    say(f"{path.stem}: finished")


def _vae(size: Size, say: Say) -> Mapping[str, Tensor]:
    return train_vae.train(size.vae_steps, size.vae_renders, say=say, device=size.device)


def _oracle(store: Store, size: Size, say: Say) -> Mapping[str, Tensor]:
    oracle = train_oracle.train(store.vae, size.oracle_steps, size.oracle_renders, say=say, device=size.device)
    fresh = train_vae.pictures(4, 99).float() / 127.5 - 1
    subject, style = train_oracle.accuracy(oracle, fresh, 4)
    say(f"oracle on fresh renders: subject {subject:.3f} style {style:.3f}")
    return oracle.state_dict()


def _base(store: Store, work: Path, size: Size, say: Say) -> Mapping[str, Tensor]:
    data = examples(store.vae, list(itertools.product(BASE_SUBJECTS, BASE_STYLES)), size.base_renders, 10, jitter=0.5)
    return resumable_base(
        work / "base.state", data, size.base_steps, batch=size.base_batch, say=say, device=size.device
    )


def resumable_base(state: Path, data: Captioned, steps: int, **options: Any) -> Mapping[str, Tensor]:
    """Train a base model, see `train_base.train`, with its state in a file until it is finished."""

    def save_state(value: dict[str, Any]) -> None:
        if is_first():
            torch.save(value, state.with_suffix(".new"))
            state.with_suffix(".new").replace(state)

    resume = torch.load(state, map_location="cpu") if state.exists() else None
    weights = train_base.train(data, steps, save=save_state, resume=resume, **options)
    wait()
    if is_first():
        state.unlink(missing_ok=True)
    return weights


def train_gates(store: Store, say: Say) -> None:
    """Train the gates of the demo's two LoRAs."""
    path = store.folder / "gates.safetensors"
    if path.exists():
        return
    trained_gates(LoraSet.load(store, Prompts(), (SUBJECT, STYLE), 0), GateSettings(), LONG).save(path)
    say("gates: finished")
