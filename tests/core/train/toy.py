"""A small diffusion model with two LoRAs, its examples, and trainings of gates on them."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from legomole.core.adapter import Adapter
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import Prompt, TrainSettings, prompts_for
from legomole.core.train.examples import Examples, make_examples
from legomole.core.train.features import standardise_features
from legomole.core.train.fit import FitRecord, fit
from legomole.core.train.objectives import Regression
from torch import Tensor, nn

from ..mole.mixtures import lora
from ..mole.models import FEATURES, Transformer, call


def encode(text: str, length: int = 4) -> Tensor:
    """``(length, FEATURES)``: a fixed random vector per word."""
    words = (text.lower().replace(",", " ").split() or ["<empty>"])[:length]
    rows = torch.zeros(length, FEATURES)
    for row, word in zip(rows, words, strict=False):
        seed = int(hashlib.sha256(word.encode()).hexdigest()[:8], 16)
        row += torch.randn(FEATURES, generator=torch.Generator().manual_seed(seed))
    return rows


class ToyDenoiser:
    """Flow matching on a `Transformer` or an `InPlace`."""

    def __init__(self, model: nn.Module, prompts: Sequence[Prompt]) -> None:
        self.model = model
        self.text = torch.stack([encode(prompt.text) for prompt in prompts])

    def sample(self, prompts: Sequence[int], seed: int) -> Tensor:
        x = torch.randn(len(prompts), 5, 4, generator=torch.Generator().manual_seed(seed))
        return x - 0.5 * self.predict(x, torch.ones(len(prompts)), prompts)

    def noise(self, batch: int, seed: int) -> Tensor:
        return torch.randn(batch, 5, 4, generator=torch.Generator().manual_seed(seed))

    def noised(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return (1 - t.view(-1, 1, 1)) * latents + t.view(-1, 1, 1) * noise

    def goal(self, latents: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        return noise - latents

    def predict(self, noisy: Tensor, t: Tensor, prompts: Sequence[int]) -> Tensor:
        return call(self.model, noisy, self.text[list(prompts)])

    def clean(self, noisy: Tensor, t: Tensor, prediction: Tensor) -> Tensor:
        return noisy - t.view(-1, 1, 1) * prediction


PROMPTS = prompts_for([["ember"], ["heart"]], ["ember", "heart", "ember heart", "a dog"])
SETTINGS = TrainSettings(steps=12, batch=8, examples=32, samples=16, warmup=2, learning_rate=0.03)


def word_detector() -> ConceptDetector:
    """Finds "ember" and "heart" among the words of `PROMPTS`: 6 for the word, -6 for the others."""
    words = ["ember", "heart", "a", "dog", "<empty>"]
    rows = torch.stack([encode(word, 1)[0] if word != "<empty>" else encode("", 1)[0] for word in words])
    rows = rows / rows.square().mean(1, keepdim=True).sqrt()
    wanted = 12 * torch.eye(len(words))[:, :2] - 6
    solution = torch.linalg.lstsq(torch.cat([rows, torch.ones(len(rows), 1)], 1), wanted, driver="gelsd").solution
    return ConceptDetector(solution[:-1].T, solution[-1], [["ember"], ["heart"]])


@dataclass
class Toy:
    model: nn.Module
    experts: tuple[Adapter, Adapter]
    denoiser: ToyDenoiser
    examples: Examples

    @contextmanager
    def attached(self, checkpointing: bool = False, **settings) -> Iterator[tuple[Attachment, Regression]]:
        """Attached with gates that standardise their features, always the same ones."""
        chosen = GateSettings(**settings)
        detector = word_detector() if chosen.reads == "text" else None
        mixture = Mixture(self.experts, GateSet(2, chosen, detector=detector))
        with attach(self.model, mixture, checkpointing=checkpointing) as at:
            e = self.examples
            standardise_features(at, lambda: self.denoiser.predict(e.noisy, e.t, e.prompt.tolist()))
            yield at, Regression(self.denoiser, e)

    def trained(self, settings: TrainSettings = SETTINGS, reads: str = "text", **kw) -> tuple[list[Tensor], FitRecord]:
        with self.attached(reads=reads) as (at, objective):
            run = fit(at, objective, settings, **kw)
            return values(at), run


def toy(make: type[nn.Module] = Transformer) -> Toy:
    model = make(1)
    experts = lora(model, 1), lora(model, 2)
    denoiser = ToyDenoiser(model, PROMPTS)
    with attach(model, Mixture(experts)) as at:
        return Toy(model, experts, denoiser, make_examples(at, denoiser, PROMPTS, SETTINGS))


def values(at: Attachment) -> list[Tensor]:
    return [p.detach().clone() for p in at.bank.gates.parameters()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Stop(Exception):
    pass


def stopping(at: int):
    def progress(done: int, total: int, what: str) -> None:
        if done == at:
            raise Stop

    return progress
