"""The ways to combine LoRAs that are compared, each under its name in the table."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.rank import Rank
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.guidance import PromptRows
from legomole.core.mole.mixture import MixMode, Mixture
from legomole.core.mole.router import concepts_in, routed_values
from legomole.core.mole.trained import TrainedGates
from legomole.core.train import Prompt, TrainSettings, train
from legomole.core.train.measure import CalibrationSettings, measure_statistics
from legomole.nano.denoiser import NanoDenoiser
from legomole.nano.model import Prompts, short_prompts
from legomole.nano.sampling import first_half
from legomole.nano.store import Store
from legomole.nano.words import WORDINGS, prompt

from .. import common
from .render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS


@dataclass
class Loras:
    """Some LoRAs of one seed, and what the methods need beside them."""

    transformer: Any
    whole: Prompts
    concepts: tuple[str, ...]
    adapters: tuple[Adapter, ...]
    seed: int
    _made: dict[Any, Any] = field(default_factory=dict[Any, Any])

    @classmethod
    def of(cls, store: Store, whole: Prompts, concepts: tuple[str, ...], seed: int) -> Loras:
        adapters = tuple(load(store.lora(concept, seed)) for concept in concepts)
        return cls(store.transformer, whole, concepts, adapters, seed)

    def once(self, make: Callable[[Loras], Any]) -> Any:
        """What `make` gives for these LoRAs, made but once."""
        if make not in self._made:
            self._made[make] = make(self)
        return self._made[make]


@contextmanager
def merged_in(transformer: Any, adapter: Adapter, strength: float) -> Generator[Any]:
    """The transformer with a LoRA in its weights, short prompts on; afterwards as it was, bit for bit."""
    with common.merged_in(transformer, adapter, strength, "transformer."), short_prompts(transformer):
        yield transformer


Use = Callable[[Loras, float, Sequence[str]], Any]  # a context manager that gives the model to paint texts with


@dataclass(frozen=True)
class Method:
    """One row of the table.

    Args:
        use: Makes the model. rank: Of the result, at N LoRAs of rank r; ``"-"`` where there is no result.
        whole: Needs all 77 tokens. fixed: Has no strength to choose.
    """

    use: Use
    rank: str = "r"
    whole: bool = False
    fixed: bool = False


def _merge(method: Callable[..., Any], rank: str = "1x", *, measured: bool = False, **options: Any) -> Use:
    """A merge: `method` is called with the rank, and with statistics where it wants them; options are `merge`'s."""

    def make(loras: Loras) -> Adapter:
        known = {"statistics": loras.once(statistics)} if measured else {}
        return merge(loras.adapters, method(Rank.parse(rank), **known), dtype=torch.float32, **options).adapter

    def use(loras: Loras, scale: float, _: Sequence[str]) -> Any:
        return merged_in(loras.transformer, loras.once(make), scale)

    return use


def asked_for(loras: Loras) -> list[Prompt]:
    """Prompts for calibration and gates: the concepts alone and together, and base ones; no unseen wording."""
    subjects = [c for c in loras.concepts if c in NEW_SUBJECTS]
    styles = [c for c in loras.concepts if c not in NEW_SUBJECTS]
    found: list[tuple[str, str]] = [(s, k) for s in subjects for k in BASE_STYLES]
    found += [(s, k) for s in BASE_SUBJECTS for k in styles]
    found += [(BASE_SUBJECTS[i], k) for i in range(len(BASE_SUBJECTS)) for k in BASE_STYLES[i % 2 :: 2]]
    texts = [prompt(*pair, way) for way in WORDINGS for pair in found]
    texts += [prompt(s, k, way) for s in subjects for k in styles for way in WORDINGS]
    rows = concepts_in(texts, [[concept] for concept in loras.concepts]).tolist()
    return [
        *(Prompt(text, tuple(i for i, hit in enumerate(row) if hit)) for text, row in zip(texts, rows, strict=True)),
        Prompt("", ()),
    ]


def statistics(loras: Loras) -> Statistics:
    """The inputs' moments on the model's own pictures."""
    asked = asked_for(loras)
    denoiser = NanoDenoiser(loras.transformer, [p.text for p in asked], loras.whole)
    modules = {name: name.removeprefix("transformer.") for name in loras.adapters[0].modules}
    with attach(loras.transformer, Mixture(loras.adapters)) as attachment:
        return measure_statistics(attachment, denoiser, asked, modules, CalibrationSettings(seed=loras.seed))


def trained_gates(loras: Loras, settings: GateSettings, training: TrainSettings) -> TrainedGates:
    """Gates for these LoRAs, as the product trains them: from the model's own pictures."""
    asked = asked_for(loras)
    denoiser = NanoDenoiser(loras.transformer, [p.text for p in asked], loras.whole)
    mixture = Mixture(loras.adapters, GateSet(len(loras.adapters), settings))
    with attach(loras.transformer, mixture) as attachment:
        return train(attachment, mixture, denoiser, asked, [[c] for c in loras.concepts], training).gates


@cache
def _training(settings: GateSettings, training: TrainSettings) -> Callable[[Loras], TrainedGates]:
    """One function for the same gates, so that `Loras.once` trains them once."""
    return lambda loras: trained_gates(loras, settings, training)


def _mole(
    settings: GateSettings, training: TrainSettings, *, times_n: bool = False, mixing: MixMode = "delta",
    rows: PromptRows | None = first_half,
) -> Use:  # fmt: skip
    @contextmanager
    def use(loras: Loras, scale: float, _: Sequence[str]) -> Generator[Any]:
        scale *= len(loras.adapters) if times_n else 1
        gates = loras.once(_training(settings, training)).gates
        mixture = Mixture(loras.adapters, gates, scale=scale, mixing=mixing)
        with attach(loras.transformer, mixture, prompt_rows=rows):
            yield loras.transformer

    return use


def _router(rows: PromptRows | None) -> Use:
    """The words of each prompt choose."""

    @contextmanager
    def use(loras: Loras, scale: float, texts: Sequence[str]) -> Generator[Any]:
        mixture = Mixture(loras.adapters, scale=scale)
        values = routed_values(concepts_in(texts, [[c] for c in loras.concepts]), mixture.gates.settings)
        with (
            attach(loras.transformer, mixture, prompt_rows=rows) as attachment,
            attachment.hold(torch.cat([values, torch.zeros_like(values)])),  # the empty prompts' come last
        ):
            yield loras.transformer

    return use


FAST = TrainSettings(steps=40, batch=16, examples=128, samples=24)
LONG = FAST.model_copy(update={"steps": 200})
_BLOCK = GateSettings(granularity="block")
_PAPER = GateSettings(granularity="block", activation="softmax", reads="experts")
METHODS: dict[str, Method] = {
    "base": Method(lambda loras, _, __: merged_in(loras.transformer, loras.adapters[0], 0.0), "-", fixed=True),
    "sum": Method(_merge(lambda _: Concat()), "N r"),
    "normalised": Method(_merge(lambda _: Concat(), normalize=True), "N r", fixed=True),
    "svd": Method(_merge(SVD)),
    "ties": Method(_merge(Ties)),
    "dare": Method(_merge(Dare)),
    "knots": Method(_merge(Knots)),
    "lego": Method(_merge(Lego)),
    "lego 0.5x": Method(_merge(Lego, "0.5x"), "0.5 r"),
    "lego 1.5x": Method(_merge(Lego, "1.5x"), "1.5 r"),
    "lego 80%": Method(_merge(Lego, "80%"), "by energy"),
    "lego mean": Method(_merge(lambda k: Lego(k, centroid="mean"))),
    "lego reweighted": Method(_merge(lambda k: Lego(k, parameter_reweight=True, output_reweight=True))),
    "lego-paper": Method(_merge(lambda k: Lego(k, "paper"))),
    "lego-paper 1.5x": Method(_merge(lambda k: Lego(k, "paper"), "1.5x"), "1.5 r"),
    "lego-paper plain": Method(
        _merge(lambda k: Lego(k, "paper", parameter_reweight=False, output_reweight=False))
    ),
    "lego calibrated": Method(_merge(Lego, measured=True)),
    "calibrated": Method(_merge(Calibrated, measured=True)),
    "calibrated 2x": Method(_merge(Calibrated, "2x", measured=True), "2 r"),
    "calibrated lam 0.1": Method(_merge(lambda k, **m: Calibrated(k, lam=0.1, **m), measured=True)),
    "calibrated lam 1": Method(_merge(lambda k, **m: Calibrated(k, lam=1.0, **m), measured=True)),
    "lego calibrated 2x": Method(_merge(Lego, "2x", measured=True), "2 r"),
    "router": Method(_router(first_half), "-", whole=True),
    "router apart": Method(_router(None), "-", whole=True),
    "mole": Method(_mole(GateSettings(), FAST), "-", whole=True),
    "mole apart": Method(_mole(GateSettings(), FAST, rows=None), "-", whole=True),
    "mole block": Method(_mole(_BLOCK, FAST), "-", whole=True),
    "mole output": Method(_mole(_BLOCK, FAST, mixing="output"), "-", whole=True),
    "mole-paper": Method(_mole(_PAPER, FAST.model_copy(update={"balance": 0.5})), "-", whole=True),
    "mole-paper x N": Method(
        _mole(_PAPER, FAST.model_copy(update={"balance": 0.02}), times_n=True), "-", whole=True),
}  # fmt: skip
