"""Ways to use two subject LoRAs in one picture, the first on the left half and the second on the right."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch
from legomole.core.formats import load
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.methods.lego import Lego
from legomole.core.merge.statistics import Statistics
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.regions.picture import AttentionObserver, Picture
from legomole.core.train import fit_detector
from legomole.core.train.measure import CalibrationSettings
from legomole.nano.model import SIDE, Prompts
from legomole.nano.sampling import STEPS, first_half, sigmas
from legomole.nano.words import WORDINGS
from torch import Tensor

from ..common import AdapterSet, merging
from ..nano import methods as nano
from ..nano.methods import LoraSet, merged_in
from ..nano.render import BASE_STYLES, BASE_SUBJECTS
from .scenes import SIDES, WIDTH, Scene
from .store import RegionStore

STRENGTH = 1.3  # of all LoRAs in all methods


class AnyScene(Protocol):
    """What a picture shows, see `Scene`."""

    def captions(self) -> Sequence[str]: ...

    def half(self, side: str) -> AnyScene: ...


@dataclass(frozen=True)
class Request:
    """Pictures to sample.

    Args:
        scenes: What each should show.
        encoder: Encoder of their prompts.
        strength: Strength of all LoRAs.
    """

    scenes: Sequence[AnyScene]
    encoder: Any
    strength: float = STRENGTH

    @property
    def texts(self) -> list[str]:
        return _texts(self.scenes)

    def region(self, side: str) -> tuple[Tensor, Tensor]:
        """Return the encoded prompts for one half alone."""
        return self.encoder(_texts([scene.half(side) for scene in self.scenes]))


def _texts(scenes: Sequence[AnyScene]) -> list[str]:
    """Return a prompt per scene, half of them in wordings that no training uses."""
    return [scene.captions()[(6, 0, 7, 1)[i % 4]] for i, scene in enumerate(scenes)]


Use = Callable[[LoraSet, Request], AbstractContextManager[Any]]
"""LoRAs of the left and the right half, pictures to sample -> the model that samples them, in a block."""


def load_pair(store: RegionStore, prompts: Prompts, pair: tuple[str, str], seed: int) -> LoraSet:
    """Load the LoRAs of two subjects, left and right."""
    adapters = tuple(load(store.lora(subject, seed)) for subject in pair)
    return LoraSet(adapters, seed, store.transformer, prompts, pair)


def half_masks() -> Tensor:
    """Return the masks of the left and the right half, ``(2, 8, 16)``."""
    masks = torch.zeros(2, SIDE, WIDTH)
    masks[0, :, :SIDE], masks[1, :, SIDE:] = 1, 1
    return masks


# ---- one file


def light_statistics(loras: LoraSet) -> Statistics:
    """Measure light statistics on scenes of one LoRA's subject, of both, and of neither."""
    first, second = loras.concepts
    scenes = [Scene(k, first, second) for k in BASE_STYLES] + [Scene(k, second, first) for k in BASE_STYLES]
    for subject, (i, style) in itertools.product(loras.concepts, enumerate(BASE_STYLES)):
        other = BASE_SUBJECTS[i]
        scenes += [Scene(style, subject, other), Scene(style, other, subject), Scene(style, subject)]
    pairs = zip(BASE_SUBJECTS, BASE_SUBJECTS[1:], itertools.cycle(BASE_STYLES), strict=False)
    scenes += [Scene(style, a, b) for a, b, style in pairs]
    texts = [text for scene in scenes for text in scene.captions()[: len(WORDINGS)]]
    settings = CalibrationSettings(seed=loras.seed)
    return nano.measured_statistics(loras, settings, nano.named_prompts([*texts, ""], loras.concepts), width=WIDTH)


def _merge(compute: Callable[[AdapterSet], Any]) -> Use:
    return lambda loras, request: merged_in(loras.transformer, loras.cached(compute), request.strength)


# ---- one pass per region


@dataclass(frozen=True)
class RegionPasses:
    """Stands in for a transformer: one pass per region, with its own LoRA and prompt; the predictions are blended.

    This is what ComfyUI computes for masked conditioning with a hook LoRA on the positive and negative conditioning of
    each region: ``sum_i m_i F_i(x, prompt_i) / sum_i m_i`` for the prompts, and the same with the empty prompt.

    Args:
        models: Transformer with the LoRA of each region in its weights.
        masks: Masks of the regions, ``(R, 8, 16)``.
        prompts: Per region, the encoded prompts of its pictures, see `Prompts`.
    """

    models: Sequence[Any]
    masks: Tensor
    prompts: Sequence[tuple[Tensor, Tensor]]

    def __call__(
        self, *, hidden_states: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, pooled_projections: Tensor,
        return_dict: bool,
    ) -> tuple[Tensor]:  # fmt: skip
        n = len(hidden_states) // 2  # the second half of a batch holds the empty prompt
        flow = torch.zeros_like(hidden_states)
        for model, mask, (hidden, pooled) in zip(self.models, self.masks, self.prompts, strict=True):
            flow += mask * model(
                hidden_states=hidden_states, timestep=timestep,
                encoder_hidden_states=torch.cat([hidden, encoder_hidden_states[n:]]),
                pooled_projections=torch.cat([pooled, pooled_projections[n:]]), return_dict=return_dict,
            )[0]  # fmt: skip
        return (flow / self.masks.sum(0),)


@contextmanager
def _hooks(loras: LoraSet, request: Request) -> Generator[RegionPasses]:
    models = loras.cached(_models(request.strength))
    yield RegionPasses(models, half_masks(), [request.region(side) for side in SIDES])


@cache
def _models(strength: float) -> Callable[[LoraSet], list[Any]]:
    """Return a function that copies the transformer per LoRA, with the LoRA in its weights."""

    def copies(loras: LoraSet) -> list[Any]:
        models: list[Any] = []
        for adapter in loras.adapters:
            with merged_in(loras.transformer, adapter, strength) as merged:
                models.append(deepcopy(merged))
        return models

    return copies


# ---- mixtures


def _gates(loras: LoraSet, request: Request) -> AbstractContextManager[Any]:
    return nano.routed(loras, Mixture(loras.adapters, scale=request.strength), request.texts, first_half)


def _masks(loras: LoraSet, request: Request) -> AbstractContextManager[Any]:
    """The router's gates times the masks; each LoRA is alone in its region, so that its gate is 1."""
    mixture = Mixture(loras.adapters, scale=request.strength, regions=tuple(half_masks()))
    return nano.routed(loras, mixture, request.texts, first_half, compose=1.0)


class _Steps:
    """Implements `SamplingReader` for `nano.sampling.sample`."""

    def parts(self, arguments: Mapping[str, Any], picture: Picture) -> None:
        return None

    def step(self, args: Sequence[Any], arguments: Mapping[str, Any]) -> int:
        return int((sigmas()[:-1] - arguments["timestep"][0] / 1000).abs().argmin())

    def reached(self, fraction: float, args: Sequence[Any], arguments: Mapping[str, Any]) -> bool:
        return self.step(args, arguments) >= fraction * STEPS

    def watch_attention(self, arguments: Mapping[str, Any], read: AttentionObserver) -> None:
        return None


def _automatic(loras: LoraSet, request: Request) -> AbstractContextManager[Any]:
    gates = GateSet(len(loras.adapters), detector=loras.cached(_detector))
    mixture = Mixture(loras.adapters, gates, scale=request.strength, regions="automatic")
    return nano.routed(loras, mixture, request.texts, first_half, compose=1.0, sampling=_Steps())


def _detector(loras: LoraSet) -> ConceptDetector:
    return fit_detector([[concept] for concept in loras.concepts], loras.world.detection()).detector


METHODS: dict[str, Use] = {
    "sum": _merge(merging(lambda _: Concat(), "1x")),
    "lego": _merge(merging(Lego, "1x", light_statistics)),
    "gates": _gates,
    "hooks": _hooks,
    "masks": _masks,
    "automatic": _automatic,
}
