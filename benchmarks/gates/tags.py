"""Pictures of the small model whose prompt gets more and more tags: sum of two LoRAs, mean gates, token gates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.observers import CollectedGates
from legomole.core.mole.trained import TrainedGates
from legomole.core.pictures.canvas import GRID, Canvas, Colour
from legomole.nano.demo import STYLE, SUBJECT, tile
from legomole.nano.model import Prompts
from legomole.nano.oracle import judge
from legomole.nano.sampling import first_half, sample
from legomole.nano.store import Store
from legomole.nano.words import prompt
from PIL import Image
from torch import Tensor

from ..nano.methods import FAST, LoraSet, trained_gates
from ..nano.render import render
from ..nano.scoring import TAGS

COUNTS = (0, 4, 8, 16, 26)
WANTED = ((SUBJECT, STYLE), (SUBJECT, "blueprint"), ("star", STYLE), ("mushroom", "flat"))
_SEED = 3
_RIGHT: Colour = (60, 160, 90)
_WRONG: Colour = (200, 60, 60)
_COLOURS: tuple[Colour, Colour] = ((31, 119, 180), (214, 102, 0))  # of the subject's gate and the style's


@dataclass(frozen=True)
class Column:
    """Pictures of one way to combine the LoRAs under one number of tags.

    Args:
        pictures: One per entry of `WANTED`, ``(4, 3, 64, 64)`` in [-1, 1].
        right: Whether each picture shows what its prompt names.
        gates: Mean gates of subject and style, ``(4, 2)``: ones for the sum, zeros without LoRAs.
    """

    pictures: Tensor
    right: tuple[bool, ...]
    gates: Tensor


def tagged(text: str, count: int) -> str:
    """A prompt with so many tags behind it."""
    return ", ".join([text, *TAGS[:count]])


def mixtures(store: Store) -> dict[str, Mixture]:
    """The LoRAs switched off, added, and with gates: the shipped ones, and ones that read the mean of the text."""
    loras = LoraSet.load(store, Prompts(), (SUBJECT, STYLE), 0)
    shipped = TrainedGates.load(store.folder / "gates.safetensors").of(list(loras.adapters))
    mean = trained_gates(loras, GateSettings(reads="text-mean"), FAST).gates
    return {
        "no LoRA": Mixture(loras.adapters, scale=0.0),
        "sum": Mixture(loras.adapters),
        "mean gates": Mixture(loras.adapters, mean),
        "token gates": Mixture(loras.adapters, shipped),
    }


def columns(store: Store, mixed: Mapping[str, Mixture]) -> dict[str, list[Column]]:
    """A column per number of tags, by the way to combine the LoRAs."""
    prompts = Prompts(any_words=True)
    result: dict[str, list[Column]] = {}
    for name, mixture in mixed.items():
        collected = CollectedGates()
        with (
            attach(store.transformer, mixture, prompt_rows=first_half) as attachment,
            attachment.watch(collected),
        ):
            result[name] = [_column(store, prompts, count, collected, mixture.scale) for count in COUNTS]
    return result


def _column(store: Store, prompts: Prompts, count: int, collected: CollectedGates, scale: float) -> Column:
    latents = sample(store.transformer, prompts, [tagged(prompt(*pair), count) for pair in WANTED], _SEED)
    pictures = store.pictures(latents)
    n = len(WANTED)  # text gates are alike in all steps; the second half of a batch are empty prompts
    gates = torch.stack([value[:n].expand(n, -1) for value in collected.values.values()]).mean(0)
    return Column(pictures, tuple(judge(store.oracle, pictures, WANTED).both.tolist()), scale * gates)


def sheet(result: Mapping[str, Sequence[Column]]) -> Image.Image:
    """Draw a block of columns per way to combine, and a row per prompt, with a render of what it names on the left.

    Frames are green where the picture shows what the prompt names, else red. The two bars below a picture are the gates
    of subject and style, full at 1.
    """
    canvas = Canvas(density=1)
    cell, left, top, space = 72, 92, 44, 14
    row = cell + 22
    block = len(COUNTS) * (cell + 6) + space
    for i, pair in enumerate(WANTED):
        target = render(*pair, np.random.default_rng(4), jitter=0)
        picture = torch.from_numpy(target.astype(np.float32)).permute(2, 0, 1) / 127.5 - 1
        canvas.image(8, top + i * row, tile(picture, cell))
        canvas.text(8 + cell / 2, top + i * row + cell + 8, " ".join(pair), size=10, anchor="mm")
    for b, (name, columns_of) in enumerate(result.items()):
        x0 = left + b * block
        canvas.text(x0 + block / 2 - space / 2, 12, name, size=15, anchor="mm")
        for j, (count, column) in enumerate(zip(COUNTS, columns_of, strict=True)):
            x = x0 + j * (cell + 6)
            canvas.text(x + cell / 2, 32, f"+{count} tags", size=11, anchor="mm")
            for i, picture in enumerate(column.pictures):
                y = top + i * row
                canvas.box(x - 3, y - 3, cell + 6, cell + 6, _RIGHT if column.right[i] else _WRONG)
                canvas.image(x, y, tile(picture, cell))
                for g, colour in enumerate(_COLOURS):
                    value = min(1.0, float(column.gates[i, g]))
                    canvas.box(x, y + cell + 5 + 6 * g, cell, 4, GRID)
                    canvas.box(x, y + cell + 5 + 6 * g, cell * value, 4, colour)
    return canvas.finish(left + len(result) * block, top + len(WANTED) * row)
