"""Fine-tune the nano base on scenes of two subjects and train subject LoRAs; finished stages are files."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from legomole.core.formats import save
from legomole.nano.model import SIDE
from legomole.nano.store import Store
from safetensors.torch import load_file
from torch import Tensor

from ..common import Say, bfloat16
from ..nano import train_loras
from ..nano.render import BASE_STYLES, NEW_SUBJECTS
from ..nano.train import resumable_base, stage
from . import judge
from .scenes import WIDTH, Scene, Scenes, base_scenes, encoder, rendered
from .store import RegionStore

SEEDS = (0, 1)


@dataclass(frozen=True)
class Size:
    """Amount of training; the defaults are those of the shipped weights."""

    base_steps: int = 900
    base_times: int = 1
    base_batch: int = 16
    lora_steps: int = 400
    lora_batch: int = 12
    lora_times: int = 2
    judge_steps: int = 500
    judge_times: int = 10
    seeds: tuple[int, ...] = SEEDS
    subjects: tuple[str, ...] = NEW_SUBJECTS


SMOKE = Size(6, 0, 4, 4, 4, 1, 4, 1, (0,), NEW_SUBJECTS[:2])


def train(work: Path, size: Size, say: Say) -> RegionStore:
    """Fine-tune the base model and train the LoRAs; return the store in `work`."""
    (work / "loras").mkdir(parents=True, exist_ok=True)
    nano = Store()
    stage(work / "base.safetensors", say, lambda: _base(nano, work, size, say))
    stage(work / "oracle.safetensors", say, lambda: _judge(nano, size, say))
    store = RegionStore(work)
    prompts = encoder(short=True)
    for seed, subject in itertools.product(size.seeds, size.subjects):
        path = store.lora(subject, seed)
        if not path.exists():
            data = lora_scenes(nano, subject, seed, size.lora_times)
            with bfloat16():
                lora = train_loras.train(
                    store.transformer, data, prompts, steps=size.lora_steps, batch=size.lora_batch, lr=_LORA_RATE,
                    seed=100 * seed + NEW_SUBJECTS.index(subject), say=say,
                )  # fmt: skip
            save(lora, path, format="diffusers")
    return store


_BASE_RATES = (7e-4, 1e-3, 8e-4, 8e-4)  # of the rounds of `Size.base_steps` steps
_LORA_RATE = 3e-3
_SIDE_SIZE = 0.3  # of the vector that tells the halves apart; a position's own values are -1 .. 1


def _base(nano: Store, work: Path, size: Size, say: Say) -> Mapping[str, Tensor]:
    shipped = nano.transformer.state_dict()
    weights = widened(shipped)
    scenes = base_scenes(size.base_times) if size.base_times else base_scenes(1)[::100]
    data, prompts = rendered(nano.vae, scenes, 20), encoder(short=True)
    for i, rate in enumerate(_BASE_RATES):
        path = work / f"base-{i}.safetensors"
        fine_tune = partial(
            resumable_base, path.with_suffix(".state"), data, size.base_steps, batch=size.base_batch, lr=rate, seed=i,
            initial=weights, frozen=("time_text_embed",), prompts=prompts, say=say,
        )  # fmt: skip
        with bfloat16():
            stage(path, say, fine_tune)
        weights = {name: tensor.float() for name, tensor in load_file(path).items()}
    return {name: tensor for name, tensor in weights.items() if not tensor.equal(shipped[name])}


def widened(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a transformer's weights with positions that make both halves of a wide canvas look like a square picture.

    Rows and columns 4 to 11 of the table's 16 x 16 positions are those of a square picture. They are used in both
    halves, with a constant vector that tells the halves apart.
    """
    name = "pos_embed.pos_embed"
    table = weights[name]  # (1, 256, width)
    grid = table.unflatten(1, (WIDTH, WIDTH)).clone()
    one = grid[:, :, SIDE // 2 : SIDE // 2 + SIDE].clone()
    side = _SIDE_SIZE * torch.randn(table.shape[-1], generator=torch.Generator().manual_seed(0))
    grid[:, :, :SIDE], grid[:, :, SIDE:] = one - side, one + side
    return {**weights, name: grid.flatten(1, 2).half().float()}


def _judge(nano: Store, size: Size, say: Say) -> Mapping[str, Tensor]:
    trained = judge.train(nano, size.judge_steps, size.judge_times, say)
    say(f"judge on new squares: {judge.accuracy(trained, judge.squares(nano, max(1, size.judge_times // 3), 77))}")
    return trained.state_dict()


def lora_scenes(nano: Store, subject: str, seed: int, times: int) -> Scenes:
    """Render a LoRA's pictures: one subject in every base style, on the left, on the right and anywhere.

    Per style ``2 times`` of each; half of the captions of the first two leave out the side.
    """
    kinds = [
        Scene(style, **{place: subject}, silent=silent)
        for style in BASE_STYLES
        for place in ("left", "right", "anywhere")
        for silent in (False, True)
    ]
    return rendered(nano.vae, kinds * times, 100 * seed + 30 + NEW_SUBJECTS.index(subject))
