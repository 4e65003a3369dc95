"""The cells of a comparison: LoRAs put on the model in several ways, and a picture painted with each."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...core.merge.methods import METHODS
from ...core.merge.statistics import Statistics
from ...core.mole.gates import GateSettings
from ...core.mole.trained import TrainedGates
from ...core.pictures.grid import MIX, PLAIN, Cell, Setup
from ..comfy import mixes
from ..comfy.lora_loader import apply
from ..comfy.sampling import decode, encode, sample
from ..loaded_loras import LoadedLoras
from ..lora import Lora
from ..merge.read_cache import read
from ..merge.recorded import merge_loaded
from ..settings import built

Progress = Callable[[int, int, str], None]


@dataclass(frozen=True, eq=False)
class Ready:
    """A model to paint with.

    Args:
        model: With the LoRAs on it. positive: Conditioning by prompt. negative: Of the negative prompt.
        remark: What making it took, and kept.
        warnings: What was dropped, and what else is worth knowing.
    """

    model: Any
    positive: Mapping[str, Any]
    negative: Any
    remark: str = ""
    warnings: tuple[str, ...] = ()


class Bench:
    """What the setups of one comparison share: the model, the LoRAs (read once) and the prompts' conditioning.

    Args:
        model: A MODEL. clip: A CLIP. negative: The negative prompt.
        loras: With their own strengths. gates: For `MIX`. statistics: For calibrated methods.
        progress: Told of the merges.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        negative: str,
        loras: Sequence[Lora],
        *,
        gates: TrainedGates | None,
        statistics: Statistics | None,
        progress: Progress,
    ) -> None:
        self.model, self.clip, self.negative, self.loras = model, clip, negative, loras
        self.gates, self.statistics, self.progress = gates, statistics, progress
        self._reading: LoadedLoras | None = None
        self._plain: dict[str, Any] = {}  # conditioning by text, of the text encoders as they are

    def ready(self, groups: Mapping[Setup, Sequence[Cell]]) -> dict[Setup, Ready]:
        """Put every setup on the model, and encode the prompts of its cells. Nothing is loaded but text encoders.

        Raises:
            MergeError: LoRAs, gates or statistics that do not fit. FormatError: A file that cannot be read.
        """
        return {setup: self._made(setup, [cell.prompt for cell in cells]) for setup, cells in groups.items()}

    def _made(self, setup: Setup, prompts: Sequence[str]) -> Ready:
        start = time.perf_counter()
        model, clip, remark, warnings = self._patched(setup)
        if setup.merges:
            remark = f"merged in {time.perf_counter() - start:.1f} s, {remark}"
        changed = _patches(clip) != _patches(self.clip)
        known: dict[str, Any] = {} if changed else self._plain
        for text in (*prompts, self.negative):
            if text not in known:
                known[text] = encode(clip, text)
        return Ready(model, known, known[self.negative], remark, warnings)

    def _patched(self, setup: Setup) -> tuple[Any, Any, str, tuple[str, ...]]:
        """MODEL and CLIP, a remark, and warnings."""
        if setup.method == PLAIN:
            return self.model, self.clip, "", ()
        if self._reading is None:
            self._reading = read(self.loras, self.model, self.clip)
        loras = [
            replace(lora, strength_model=lora.strength_model * factor, strength_clip=lora.strength_clip * factor)
            for lora, factor in zip(self.loras, setup.factors, strict=True)
        ]
        if setup.method == MIX:
            settings = GateSettings(granularity="block")
            mix = mixes.build(loras, self.model, self.clip, reading=self._reading, gates=self.gates, settings=settings)
            clip = mixes.on_clip(mix, self.model, self.clip, METHODS["concat"]())
            kind = "trained gates" if mix.mixture.gates.trained else "even gates"
            return mixes.on_model(mix, self.model), clip, kind, (*self._reading.dropped, *self._reading.notes)
        statistics = None
        if setup.calibrated and self.statistics is not None:
            statistics = self.statistics.of(self._reading.adapters)
        method = built(METHODS, {"method": setup.row, "rank": setup.rank}, statistics)
        told = partial(_told, self.progress, f"merging {setup.text()}")
        lora, report = merge_loaded(loras, self._reading, method, progress=told)
        model, clip = apply(lora, self.model, self.clip, 1.0, 1.0)
        low, high = report.ranks_out
        kept = f"rank {low}{f' to {high}' * (high > low)}, {report.energy_kept:.1%} of the sum's energy kept"
        return model, clip, kept, (*report.dropped, *report.notes)


def paint(
    groups: Mapping[Setup, Sequence[Cell]],
    ready: dict[Setup, Ready],
    vae: Any,
    latent: Mapping[str, Any],
    *,
    steps: int,
    cfg: float,
    sampler: str,
    scheduler: str,
    latent_scale: float,
    progress: Progress,
) -> tuple[dict[Cell, Tensor], dict[Cell, float]]:
    """Paint every cell.

    Args:
        groups: The cells by setup. ready: Their models; each is let go when it is done with.
        vae: A VAE. latent: A LATENT to start from.
        latent_scale: On its sides, before it is decoded.
        progress: Told of all steps of all cells. May raise to cancel.

    Returns:
        Pictures ``(B, H, W, 3)`` in 0 .. 1, and seconds.
    """
    pictures: dict[Cell, Tensor] = {}
    seconds: dict[Cell, float] = {}
    count = sum(map(len, groups.values()))
    for setup, cells in groups.items():
        made = ready.pop(setup)
        for cell in cells:
            start, number = time.perf_counter(), len(pictures)
            what = f"cell {number + 1} of {count} ({setup.text()}): all steps"
            told = partial(_step, progress, number * steps, count * steps, what)
            told(0)
            samples = sample(
                made.model,
                made.positive[cell.prompt],
                made.negative,
                latent,
                seed=cell.seed,
                steps=steps,
                cfg=cfg,
                sampler=sampler,
                scheduler=scheduler,
                progress=told,
            )
            pictures[cell] = decode(vae, samples, latent_scale)
            seconds[cell] = time.perf_counter() - start
    return pictures, seconds


def _patches(clip: Any) -> int:
    """How many changes there are to the text encoders: those of a LoRA without text encoder parts are none."""
    return 0 if clip is None else sum(map(len, clip.patcher.patches.values()))


def _told(progress: Progress, what: str, done: int, total: int, name: str) -> None:
    progress(done, total, what)


def _step(progress: Progress, before: int, total: int, what: str, done: int) -> None:
    progress(before + done, total, what)
