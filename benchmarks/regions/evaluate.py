"""Measure rows: every method on every pair of LoRAs and seed, and each LoRA alone; an interrupted run resumes."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import torch
from legomole.core.formats import load
from legomole.nano.model import predict
from legomole.nano.sampling import noise, sigmas
from legomole.nano.words import SUBJECTS

from ..common import ResultLog, Say, mean
from ..nano.methods import LoraSet, merged_in
from ..nano.render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS
from .judge import MIXTURE
from .methods import METHODS, STRENGTH, Request, load_pair
from .scenes import SIDES, WIDTH, Scene, encoder
from .scoring import Verdict, judged, sampled
from .store import RegionStore
from .train import SEEDS

PAIRS = tuple(itertools.combinations(NEW_SUBJECTS, 2))
_TIMED = 15  # rounds of the timing, with three passes each


@dataclass(frozen=True)
class Row:
    """Result of a method on a pair of LoRAs.

    Args:
        pair: Subjects on the left and on the right; of the base model and of a LoRA alone as far as they apply.
        seed: Seed of the LoRAs and of the noise.
        right_place: Share of pictures of both subjects in which each half shows its own.
        halves: Share of halves that do.
        other: Share of halves that show the other LoRA's subject; of a LoRA alone, its own in the other half.
        bleeding: Share of halves that show the other LoRA's subject, or a mixture of two.
        base: Share of halves of pictures of base subjects that show their subject and style.
        seconds: Time to combine, sample and judge.
    """

    method: str
    pair: tuple[str, ...]
    seed: int
    right_place: float
    halves: float
    other: float
    bleeding: float
    base: float
    seconds: float

    @property
    def concepts(self) -> tuple[str, ...]:
        return self.pair


@dataclass(frozen=True)
class Amount:
    """Numbers of pictures per row: of both subjects, of base subjects, and of a LoRA alone per side."""

    both: int = 12
    base: int = 6
    alone: int = 8


class Bench:
    """Measures rows and logs them."""

    def __init__(self, store: RegionStore, log: Path, say: Say, amount: Amount | None = None) -> None:
        self.store, self.log, self.say, self.amount = store, ResultLog(log), say, amount or Amount()
        self.short, self.whole = encoder(short=True), encoder()
        self.rows = {(row.method, row.pair, row.seed): row for row in self.log.rows(Row, "pair")}

    def loras(self, pair: tuple[str, str], seed: int) -> LoraSet:
        """Load the LoRAs; seed 1 has them the other way round."""
        return load_pair(self.store, self.whole, pair if seed % 2 == 0 else (pair[1], pair[0]), seed)

    def pair(self, pair: tuple[str, str], seed: int) -> None:
        """Measure all methods on a pair of LoRAs."""
        missing = [name for name in METHODS if (name, pair, seed) not in self.rows]
        if not missing:
            return
        loras = self.loras(pair, seed)
        scenes = (*both_scenes(loras.concepts, self.amount.both, seed), *base_scenes(self.amount.base, seed))
        request, asked = Request(scenes, self.short), slice(self.amount.both)
        for name in missing:
            began = time.monotonic()
            with METHODS[name](loras, request) as model:
                verdict = judged(self.store, sampled(self.store, model, request, 1000 * seed + 7))
            own = verdict.subject_right(scenes)[asked]
            other, mixed = swapped(verdict, loras.concepts)[asked], (verdict.subjects == MIXTURE)[asked]
            self._add(Row(
                name, pair, seed, own.all(1).float().mean().item(), own.float().mean().item(),
                other.float().mean().item(), (other | mixed).float().mean().item(), self._base(verdict, scenes),
                time.monotonic() - began,
            ))  # fmt: skip

    def _base(self, verdict: Verdict, scenes: Sequence[Scene]) -> float:
        return verdict.right(scenes)[self.amount.both :].float().mean().item() if self.amount.base else math.nan

    def alone(self, subject: str, seed: int, side: str) -> None:
        """Measure one LoRA alone: its subject on one half, a base subject on the other."""
        if (f"alone {side}", (subject,), seed) in self.rows:
            return
        began, column = time.monotonic(), SIDES.index(side)
        scenes = alone_scenes(subject, side, self.amount.alone, seed)
        request = Request(scenes, self.short)
        with merged_in(self.store.transformer, load(self.store.lora(subject, seed)), STRENGTH) as model:
            verdict = judged(self.store, sampled(self.store, model, request, 1000 * seed + 8))
        right = verdict.subject_right(scenes)
        other = verdict.shows(subject)[:, 1 - column]
        bled = other | (verdict.subjects == MIXTURE)[:, 1 - column]
        self._add(Row(
            f"alone {side}", (subject,), seed, right.all(1).float().mean().item(),
            right[:, column].float().mean().item(), other.float().mean().item(), bled.float().mean().item(),
            right[:, 1 - column].float().mean().item(), time.monotonic() - began,
        ))  # fmt: skip

    def base(self, seed: int) -> None:
        """Measure the base model, on scenes of two base subjects."""
        if ("base", (), seed) in self.rows:
            return
        began = time.monotonic()
        scenes = base_scenes(4 * self.amount.base, seed)
        request = Request(scenes, self.short)
        verdict = judged(self.store, sampled(self.store, self.store.transformer, request, 1000 * seed + 7))
        own = verdict.subject_right(scenes)
        self._add(Row(
            "base", (), seed, own.all(1).float().mean().item(), own.float().mean().item(), 0.0,
            (verdict.subjects == MIXTURE).float().mean().item(), verdict.right(scenes).float().mean().item(),
            time.monotonic() - began,
        ))  # fmt: skip

    def _add(self, row: Row) -> None:
        self.rows[row.method, row.pair, row.seed] = row
        self.log.append(asdict(row))
        self.say(
            f"{row.method:12} {'+'.join(row.pair):12} seed {row.seed} right place {row.right_place:.2f} halves "
            f"{row.halves:.2f} bleeding {row.bleeding:.2f} base {row.base:.2f} {row.seconds:.1f} s"
        )

    def alone_halves(self, pair: tuple[str, ...], seed: int) -> float:
        """Return how often each LoRA alone shows its subject in its half, the mean of both."""
        placed = zip(pair if seed % 2 == 0 else pair[::-1], SIDES, strict=True)
        return mean([self.rows[f"alone {side}", (subject,), seed].halves for subject, side in placed])


def swapped(verdict: Verdict, pair: Sequence[str]) -> torch.Tensor:
    """Return whether each half shows the subject of the other half, ``(n, 2)`` bool."""
    return verdict.subjects == torch.tensor([SUBJECTS.index(subject) for subject in reversed(pair)])


def both_scenes(pair: Sequence[str], count: int, seed: int) -> tuple[Scene, ...]:
    """Return scenes of the pair in varying base styles."""
    return tuple(Scene(BASE_STYLES[(i + 3 * seed) % len(BASE_STYLES)], *pair) for i in range(count))


def alone_scenes(subject: str, side: str, count: int, seed: int) -> tuple[Scene, ...]:
    """Return scenes of a subject on one side with base subjects on the other."""
    others = [BASE_SUBJECTS[(5 * i + seed) % len(BASE_SUBJECTS)] for i in range(count)]
    scenes = both_scenes((subject, subject), count, seed)
    return tuple(
        Scene(scene.style, **{side: subject, ({*SIDES} - {side}).pop(): other})
        for scene, other in zip(scenes, others, strict=True)
    )


def base_scenes(count: int, seed: int) -> tuple[Scene, ...]:
    """Return scenes of two different base subjects."""
    n = len(BASE_SUBJECTS)
    pairs = [
        (BASE_SUBJECTS[(7 * i + seed) % n], BASE_SUBJECTS[(7 * i + seed + 1 + i % (n - 1)) % n]) for i in range(count)
    ]
    return tuple(Scene(BASE_STYLES[(5 * i + seed) % len(BASE_STYLES)], *pair) for i, pair in enumerate(pairs))


def run(bench: Bench, pairs: Sequence[tuple[str, str]] = PAIRS, seeds: Sequence[int] = SEEDS) -> None:
    """Measure all rows."""
    for seed in seeds:
        bench.base(seed)
        for subject, side in itertools.product(sorted({s for pair in pairs for s in pair}), SIDES):
            bench.alone(subject, seed, side)
    for seed, pair in itertools.product(seeds, pairs):
        bench.pair(pair, seed)


@torch.no_grad()
def seconds_per_step(bench: Bench, pair: tuple[str, str] = PAIRS[0], rounds: int = _TIMED) -> dict[str, float]:
    """Time one step of sampling one picture with guidance and all 77 tokens, by method.

    The methods take turns; each value is the median of the processor time of three passes per turn. Combining the
    LoRAs and encoding the prompts is not included.
    """
    loras = bench.loras(pair, 0)
    request = Request(both_scenes(loras.concepts, 1, 0), bench.whole)
    x = noise(2, 0, width=WIDTH)
    sigma, prompts = torch.full((2,), 0.7), bench.whole([*request.texts, ""])
    times: dict[str, list[float]] = {name: [] for name in METHODS}
    for _, name in itertools.product(range(rounds), METHODS):
        with METHODS[name](loras, request) as model:
            for early in sigmas()[:2]:  # steps in which automatic regions read attention
                predict(model, x, early.expand(2), *prompts)
            for _ in range(3):
                began = time.process_time()
                predict(model, x, sigma, *prompts)
                times[name].append(time.process_time() - began)
    return {name: median(values) for name, values in times.items()}
