"""Ways to combine LoRAs, by their names in the tables."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from legomole.core.adapter import Adapter
from legomole.core.formats import load
from legomole.core.merge.methods.calibrated import Calibrated
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.dare import Dare
from legomole.core.merge.methods.knots import Knots
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.methods.np_lora import NP
from legomole.core.merge.methods.ssr import SSR
from legomole.core.merge.methods.svd import SVD
from legomole.core.merge.methods.ties import Ties
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.guidance import PromptRows
from legomole.core.mole.mixture import MixMode, Mixture
from legomole.core.mole.regions.picture import SamplingReader
from legomole.core.mole.router import COMPOSE, concepts_in, routed_values
from legomole.core.mole.trained import TrainedGates
from legomole.core.train import Prompt, TrainSettings, fit_detector, train
from legomole.core.train.detector import PromptEncoder
from legomole.core.train.measure import CalibrationSettings, measure_statistics
from legomole.nano.denoiser import NanoDenoiser, NanoPromptEncoder
from legomole.nano.model import SIDE, Prompts
from legomole.nano.sampling import first_half
from legomole.nano.store import Store
from legomole.nano.words import WORDINGS, prompt

from .. import common
from ..common import AdapterSet, merging
from .render import BASE_STYLES, BASE_SUBJECTS, NEW_SUBJECTS


@dataclass(frozen=True)
class World:
    """What prompts can name.

    Args:
        base_subjects, base_styles: Subjects and styles of the base model that calibration and gates are given.
        new_subjects: Subjects of LoRAs; their other concepts are styles.
        wordings: Wordings of the prompts for calibration and gates.
        prompt: Formats a wording with subject and style.
        detection: Builds the text encoder that concept detectors are fitted with.
    """

    base_subjects: Sequence[str]
    base_styles: Sequence[str]
    new_subjects: Sequence[str]
    wordings: Sequence[str]
    prompt: Callable[[str, str, str], str]
    detection: Callable[[], PromptEncoder]


NANO = World(
    BASE_SUBJECTS, BASE_STYLES, NEW_SUBJECTS, WORDINGS, prompt, lambda: NanoPromptEncoder(Prompts(any_words=True))
)


@dataclass
class LoraSet(AdapterSet):
    """LoRAs of one seed, with the model they belong to.

    Args:
        transformer: The base model.
        prompts: Prompt encoder for whole prompts.
        concepts: Concept of each LoRA.
        world: What prompts can name.
    """

    transformer: Any
    prompts: Any
    concepts: tuple[str, ...]
    world: World = NANO

    @classmethod
    def load(cls, store: Store, prompts: Prompts, concepts: tuple[str, ...], seed: int) -> LoraSet:
        adapters = tuple(load(lora_file(store, concept, seed)) for concept in concepts)
        return cls(adapters, seed, store.transformer, prompts, concepts)


def lora_file(store: Store, concept: str, seed: int) -> Path:
    """The file of a LoRA: of the store, or beside this benchmark for a concept that the package does not ship."""
    path = store.lora(concept, seed)
    return path if path.exists() else Path(__file__).parent / "loras" / path.name


def merged_in(transformer: Any, adapter: Adapter, strength: float) -> AbstractContextManager[Any]:
    """Add a LoRA to the transformer's weights inside the block."""
    return common.merged_in(transformer, adapter, strength, "transformer.")


Use = Callable[[LoraSet, float, Sequence[str]], Any]  # LoRAs, strength, prompts -> context manager


@dataclass(frozen=True)
class Method(common.Method):
    """A way to combine LoRAs.

    Args:
        whole: Whether the model needs all 77 tokens of a prompt.
    """

    whole: bool = False


def _merge(
    method: Callable[..., Any], rank: str = "1x", *, measured: bool = False, light: bool = False, **options: Any
) -> Use:
    """Merge the LoRAs, see `merging`; `measured` methods get full statistics, `light` ones sketched statistics."""
    measure = light_statistics if light else thorough_statistics if measured else None
    compute = merging(method, rank, measure, **options)

    def use(loras: LoraSet, scale: float, _: Sequence[str]) -> Any:
        return merged_in(loras.transformer, loras.cached(compute), scale)

    return use


def training_prompts(loras: LoraSet) -> list[Prompt]:
    """Return prompts for calibration and gates, without the unseen wordings: each concept alone, pairs, base ones."""
    world = loras.world
    subjects = [c for c in loras.concepts if c in world.new_subjects]
    styles = [c for c in loras.concepts if c not in world.new_subjects]
    pairs: list[tuple[str, str]] = [(s, k) for s in subjects for k in world.base_styles]
    pairs += [(s, k) for s in world.base_subjects for k in styles]
    pairs += [(s, k) for i, s in enumerate(world.base_subjects) for k in world.base_styles[i % 2 :: 2]]
    texts = [world.prompt(*pair, wording) for wording in world.wordings for pair in pairs]
    texts += [world.prompt(s, k, wording) for s in subjects for k in styles for wording in world.wordings]
    return named_prompts([*texts, ""], loras.concepts)


def named_prompts(texts: Sequence[str], concepts: Sequence[str]) -> list[Prompt]:
    """Return the prompts with the concepts that they name."""
    rows = concepts_in(texts, [[concept] for concept in concepts]).tolist()
    return [Prompt(text, tuple(i for i, hit in enumerate(row) if hit)) for text, row in zip(texts, rows, strict=True)]


def thorough_statistics(loras: LoraSet) -> Statistics:
    """Measure full statistics, on more prompts than by default."""
    return measured_statistics(loras, CalibrationSettings(mode="thorough", samples=24, seed=loras.seed))


def light_statistics(loras: LoraSet) -> Statistics:
    """Measure light statistics, as `legomole merge --base` does."""
    return measured_statistics(loras, CalibrationSettings(seed=loras.seed))


def measured_statistics(
    loras: LoraSet, settings: CalibrationSettings, prompts: Sequence[Prompt] | None = None, *, width: int = SIDE
) -> Statistics:
    """Measure the inputs of the layers on prompts of every kind, by default `training_prompts`; `width` of latents."""
    prompts = training_prompts(loras) if prompts is None else prompts
    denoiser = _denoiser(loras, prompts, width)
    modules = {name: name.removeprefix("transformer.") for name in loras.adapters[0].modules}
    with attach(loras.transformer, Mixture(loras.adapters)) as attachment:
        return measure_statistics(attachment, denoiser, prompts, modules, settings)


def _denoiser(loras: LoraSet, prompts: Sequence[Prompt], width: int = SIDE) -> NanoDenoiser:
    channels = loras.transformer.config.in_channels
    return NanoDenoiser(loras.transformer, [p.text for p in prompts], loras.prompts, width=width, channels=channels)


def trained_gates(loras: LoraSet, settings: GateSettings, training: TrainSettings) -> TrainedGates:
    """Train gates on samples of the model, as `legomole train-gates` does."""
    prompts = training_prompts(loras)
    denoiser = _denoiser(loras, prompts)
    detector = None
    if settings.reads == "text":
        detector = fit_detector([[concept] for concept in loras.concepts], loras.world.detection()).detector
    mixture = Mixture(loras.adapters, GateSet(len(loras.adapters), settings, detector=detector))
    with attach(loras.transformer, mixture) as attachment:
        return train(attachment, mixture, denoiser, prompts, [[c] for c in loras.concepts], training).gates


@cache
def _training(settings: GateSettings, training: TrainSettings) -> Callable[[LoraSet], TrainedGates]:
    """Return the same function for the same settings, so that `LoraSet.cached` trains each kind of gates once."""
    return lambda loras: trained_gates(loras, settings, training)


def _mole(
    settings: GateSettings, training: TrainSettings, *, times_n: bool = False, mixing: MixMode = "delta",
    rows: PromptRows | None = first_half,
) -> Use:  # fmt: skip
    """Mix the LoRAs with trained gates; `times_n` multiplies the strength by the number of LoRAs."""

    @contextmanager
    def use(loras: LoraSet, scale: float, _: Sequence[str]) -> Generator[Any]:
        scale *= len(loras.adapters) if times_n else 1
        gates = loras.cached(_training(settings, training)).gates
        mixture = Mixture(loras.adapters, gates, scale=scale, mixing=mixing)
        with attach(loras.transformer, mixture, prompt_rows=rows):
            yield loras.transformer

    return use


def _router(rows: PromptRows | None) -> Use:
    """Mix the LoRAs whose concepts each prompt names."""

    def use(loras: LoraSet, scale: float, texts: Sequence[str]) -> AbstractContextManager[Any]:
        return routed(loras, Mixture(loras.adapters, scale=scale), texts, rows)

    return use


@contextmanager
def routed(
    loras: LoraSet, mixture: Mixture, texts: Sequence[str], rows: PromptRows | None, *, compose: float = COMPOSE,
    sampling: SamplingReader | None = None,
) -> Generator[Any]:  # fmt: skip
    """Attach a mixture inside the block, with the gates of the prompt router for these prompts, see `routed_values`."""
    named = concepts_in(texts, [[c] for c in loras.concepts])
    values = routed_values(named, mixture.gates.settings, compose)
    values, named = (torch.cat([x, torch.zeros_like(x)]) for x in (values, named))  # the empty prompt names nothing
    with (
        attach(loras.transformer, mixture, prompt_rows=rows, sampling=sampling) as attachment,
        attachment.hold(values, named=named),
    ):
        yield loras.transformer


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
    "one-step": Method(_merge(Lego, light=True)),
    "ssr": Method(_merge(SSR, light=True)),
    "np": Method(_merge(NP)),
    "calibrated": Method(_merge(Calibrated, measured=True)),
    "calibrated 2x": Method(_merge(Calibrated, "2x", measured=True), "2 r"),
    "calibrated lam 0.1": Method(_merge(lambda k, **m: Calibrated(k, lam=0.1, **m), measured=True)),
    "calibrated lam 1": Method(_merge(lambda k, **m: Calibrated(k, lam=1.0, **m), measured=True)),
    "lego calibrated 2x": Method(_merge(Lego, "2x", measured=True), "2 r"),
    "router": Method(_router(first_half), "-", whole=True),
    "router apart": Method(_router(None), "-", whole=True),
    "mole": Method(_mole(GateSettings(), FAST), "-", whole=True),
    "mole mean": Method(_mole(GateSettings(reads="text-mean"), FAST), "-", whole=True),
    "mole apart": Method(_mole(GateSettings(), FAST, rows=None), "-", whole=True),
    "mole block": Method(_mole(_BLOCK, FAST), "-", whole=True),
    "mole output": Method(_mole(_BLOCK, FAST, mixing="output"), "-", whole=True),
    "mole-paper": Method(_mole(_PAPER, FAST.model_copy(update={"balance": 0.5})), "-", whole=True),
    "mole-paper x N": Method(
        _mole(_PAPER, FAST.model_copy(update={"balance": 0.02}), times_n=True), "-", whole=True),
}  # fmt: skip
