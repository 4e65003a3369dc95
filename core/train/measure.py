"""Measure the statistics for a calibrated merge: inputs of a model's layers, by kind of prompt.

Nothing is sampled: the model sees noised zero latents, once per prompt. Full statistics of the same passes make merges
of the same quality as those of sampled images.

Source: RegMean, arXiv:2212.09849, for the least squares of `methods.calibrated.Calibrated`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import MergeError, name_some
from ..merge.statistics import ModuleStatistics, Statistics
from ..mole.attach import Attachment
from ..progress import Progress
from .denoiser import Denoiser
from .examples import target_gates
from .prompts import Prompt
from .second_moments import LayerInput, SecondMoments, find_shared_inputs, record_inputs
from .sketches import ProjectedMoments, RangeSketch, reduce_basis

EVALUATIONS = 40
"""Forward passes per LoRA: as many as one image of 20 sampling steps with guidance takes."""
MAX_MOMENT_BYTES = 2 << 30  # moments on the model's device at a time; if more, the passes are repeated
_MIN_TIME = 0.05  # times are drawn from here to 1: closer to 0 there is almost no noise to predict
_SPARE = 2  # directions that are measured for each that is kept
_WEIGHTS = {"own": 1.0, "joint": 3.0, "base": 0.3}  # of the kinds in the basis: those of the calibrated merge

ForwardPass = Callable[[], Any]
"""Runs the model once."""
Kind = tuple[int, ...]
"""The adapters that the prompts of a kind name, by their positions, ascending."""


class CalibrationSettings(BaseModel):
    """Settings of measuring statistics. The same settings, model and LoRAs give the same statistics.

    Args:
        mode: ``light``: sketches of the second moments. ``thorough``: the second moments themselves, ``d^2`` values for
            an input of width d, and sketches where the input is wider than `widest`.
        samples: Number of prompts for each kind: each LoRA alone, every group that prompts name together, none.
            ``None``: as many as fit into 40 forward passes per LoRA.
        width: Number of directions in the basis of a sketch. Inputs at most twice as wide are measured in full.
        batch: Number of prompts per forward pass.
        compose: Factor on LoRAs that a prompt names together.
        widest: Largest width of an input whose second moments are measured in full.
        seed: Random seed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["light", "thorough"] = "light"
    samples: int | None = Field(default=None, ge=1)
    width: int = Field(default=64, ge=1)
    batch: int = Field(default=1, ge=1)
    compose: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    widest: int = Field(default=8192, ge=1)
    seed: int = Field(default=0, ge=0)

    def samples_per_kind(self, adapters: int, kinds: int) -> tuple[int, int]:
        """Number of prompts of a kind in the first passes, which find the bases, and in the passes that measure."""
        if self.samples is not None:
            return max(1, self.samples // 16), self.samples
        each = max(2, (EVALUATIONS * adapters - 1) // kinds)  # one more finds the layers that share an input
        first = max(1, each // 16)
        return first, each - first


@dataclass(frozen=True, eq=False)
class KindPasses:
    """Forward passes on prompts of one kind.

    Args:
        gates: Gate value of each adapter in these passes.
        first: Passes that find the bases of light statistics.
        measured: Passes whose inputs are measured.
    """

    gates: Sequence[float]
    first: Sequence[ForwardPass]
    measured: Sequence[ForwardPass]


def measure_statistics(
    attachment: Attachment,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    modules: Mapping[str, str],
    settings: CalibrationSettings | None = None,
    *,
    adapters: Sequence[str] = (),
    strengths: Sequence[float] = (),
    progress: Progress | None = None,
) -> Statistics:
    """Measure the inputs of a diffusion model's layers on noised zero latents, for each kind of prompt.

    Args:
        attachment: The LoRAs on the model, as a mixture; its gates are held by this function.
        denoiser: Runs that model; its prompts are `prompts`, in order.
        prompts: See `train.prompts_for`: some that name each LoRA alone, some that name several, some that name none.
        modules: Name in the statistics -> path of the layer in the model.
        settings: Default `CalibrationSettings()`.
        adapters: sha256 of the LoRAs' files, in the mixture's order, for the statistics' file.
        strengths: Strengths of the LoRAs on the model, for the statistics' file.
        progress: See `measure_passes`.

    Raises:
        MergeError: A LoRA that no prompt names alone, or see `measure_passes`.
    """
    settings = settings or CalibrationSettings()
    kinds: dict[Kind, list[int]] = {}
    for i, prompt in enumerate(prompts):
        kinds.setdefault(prompt.named, []).append(i)
    missing = [i for i in range(attachment.bank.experts) if (i,) not in kinds]
    if missing:
        raise MergeError(
            f"No prompt names LoRA number {missing[0] + 1} alone, so its own effect cannot be measured.",
            remedy="add prompts that name it and no other LoRA, or leave the prompts to legomole",
        )
    first, measured = settings.samples_per_kind(attachment.bank.experts, len(kinds))
    passes: dict[Kind, KindPasses] = {}
    for n, (named, members) in enumerate(sorted(kinds.items())):
        gates = target_gates([Prompt("", named)], attachment.bank.experts, settings.compose)[0].tolist()
        seed = 1000 * settings.seed + 2 * n
        passes[named] = KindPasses(
            gates,
            _noise_passes(denoiser, members, first, settings.batch, seed),
            _noise_passes(denoiser, members, measured, settings.batch, seed + 1),
        )
    metadata = {
        "settings": json.dumps(settings.model_dump()),
        "prompts": json.dumps([prompt.text for prompt in prompts]),
    }
    measurements = measure_passes(attachment, passes, modules, settings, progress=progress)
    return Statistics(measurements, tuple(adapters), tuple(strengths), metadata)


def _noise_passes(denoiser: Denoiser, members: Sequence[int], samples: int, batch: int, seed: int) -> list[ForwardPass]:
    """Passes on noised zero latents for `samples` of the prompts `members`, at times spread over the schedule."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(max(samples, len(members)), generator=generator).tolist()
    drawn = [members[i % len(members)] for i in order[:samples]]
    spread = torch.randperm(samples, generator=generator) + torch.rand(samples, generator=generator)
    times = _MIN_TIME + (1 - _MIN_TIME) * spread / samples

    def run(start: int) -> None:
        rows, t = drawn[start : start + batch], times[start : start + batch]
        noise = denoiser.noise(len(rows), 10_000 * seed + start)
        denoiser.predict(denoiser.noised(torch.zeros_like(noise), t, noise), t, rows)

    return [lambda start=start: run(start) for start in range(0, samples, batch)]


def measure_passes(
    attachment: Attachment,
    kinds: Mapping[Kind, KindPasses],
    modules: Mapping[str, str],
    settings: CalibrationSettings,
    *,
    progress: Progress | None = None,
) -> dict[str, ModuleStatistics]:
    """Measure the inputs of layers in forward passes of several kinds.

    Layers that read the very same tensor (the three projections of an attention) are measured once, and share their
    statistics in the result. Sums are float32 on the model's device; the result is on the CPU. Layers that the model
    does not use are left out.

    Args:
        attachment: The adapters on the model; its gates are held by this function.
        kinds: Adapters that the prompts of a kind name -> the passes on these prompts.
        modules: Name in the statistics -> path of the layer in the model.
        settings: Mode and width.
        progress: Called with (passes done, passes in all, description). May raise an exception to cancel.

    Raises:
        MergeError: No layer that can be measured, or inputs that are not finite.
    """
    layers = {name: attachment.model.get_submodule(path) for name, path in modules.items()}
    with torch.no_grad():
        plan = _plan(attachment, kinds, layers, settings)
        sketched = [group for group in plan.groups if any(name in plan.sketched for name in group)]
        total = sum(len(kind.first) * len(sketched) + len(kind.measured) * len(plan.groups) for kind in kinds.values())
        run = _PassRunner(attachment, progress, total)
        matrices: dict[str, dict[Kind, Tensor]] = {}
        bases: dict[str, Tensor] = {}
        for group in plan.groups:
            bases |= _find_bases(run, kinds, {name: layers[name] for name in group if name in plan.sketched}, settings)
            recorded = {name: layers[name] for name in group}
            for named, kind in kinds.items():
                moments = {name: ProjectedMoments(bases[name]) if name in bases else SecondMoments() for name in group}
                with record_inputs(recorded, moments):
                    run(kind.measured, kind.gates, "measuring")
                for name, accumulated in moments.items():
                    matrices.setdefault(name, {})[named] = accumulated.value.cpu()
            _check_finite(matrices)
            for name in bases.keys() & set(group):
                bases[name], matrices[name] = reduce_basis(bases[name], matrices[name], _weights(kinds), settings.width)
    statistics = {
        name: ModuleStatistics(
            {named[0]: C for named, C in of_kind.items() if len(named) == 1},
            {named: C for named, C in of_kind.items() if len(named) > 1},
            of_kind.get(()),
            bases.get(name),
        )
        for name, of_kind in matrices.items()
    }
    return {name: statistics[first] for name, first in plan.first.items()}


class _PassRunner:
    """Runs passes with the gates of their kind, and reports progress."""

    def __init__(self, attachment: Attachment, progress: Progress | None, total: int) -> None:
        self.attachment, self.progress, self.total, self.count = attachment, progress, total, 0

    def __call__(self, passes: Sequence[ForwardPass], gates: Sequence[float], description: str) -> None:
        with self.attachment.hold(gates):
            for run in passes:
                run()
                self.count += 1
                if self.progress is not None:
                    self.progress(self.count, self.total, description)


def _find_bases(
    run: _PassRunner, kinds: Mapping[Kind, KindPasses], layers: Mapping[str, nn.Module], settings: CalibrationSettings
) -> dict[str, Tensor]:
    """A basis for each layer, from the first passes of all kinds together: twice as many directions as are kept."""
    sketches = {name: RangeSketch(_SPARE * settings.width, settings.seed) for name in layers}
    for named, kind in kinds.items() if layers else ():
        for sketch in sketches.values():
            sketch.weight = _weights(kinds)[named] / len(kind.first)
        with record_inputs(layers, sketches):
            run(kind.first, kind.gates, "finding directions")
    # the memory of each sketch is free before the next basis is made
    return {name: sketches.pop(name).basis().float() for name in list(sketches)}


def _weights(kinds: Iterable[Kind]) -> dict[Kind, float]:
    return {named: _WEIGHTS["base" if not named else "own" if len(named) == 1 else "joint"] for named in kinds}


@dataclass(frozen=True)
class _Plan:
    """Which layers are measured together.

    Args:
        first: Name -> the first layer that reads the same input. Layers that the model does not use are left out.
        sketched: Those of the first layers that get a sketch.
        groups: The first layers, in groups that are measured at a time.
    """

    first: Mapping[str, str]
    sketched: frozenset[str]
    groups: Sequence[Sequence[str]]


def _plan(
    attachment: Attachment,
    kinds: Mapping[Kind, KindPasses],
    layers: Mapping[str, nn.Module],
    settings: CalibrationSettings,
) -> _Plan:
    """Run one pass (any will do) to find out which layers read which input."""
    some_kind = next(iter(kinds.values()))
    with attachment.hold(some_kind.gates), find_shared_inputs(layers) as inputs:
        some_kind.measured[0]()
    first: dict[str, str] = {}
    reader_of: dict[object, str] = {}
    for name in (name for name in layers if name in inputs):
        first[name] = reader_of.setdefault(inputs[name].tensors, name)
    if not first:
        raise MergeError(
            "None of the layers can be measured.",
            module=name_some(layers),
            expected="layers that the model uses for these prompts",
            found=f"{len(layers)} that it does not use",
        )
    distinct = list(dict.fromkeys(first.values()))
    sketched = frozenset(name for name in distinct if _is_sketched(inputs[name], settings))
    groups: list[list[str]] = []
    bytes_left = 0
    for name in distinct:
        d_in = inputs[name].d_in
        size = 4 * d_in * (_SPARE * settings.width if name in sketched else d_in)
        if size > bytes_left:
            groups.append([])
            bytes_left = MAX_MOMENT_BYTES
        groups[-1].append(name)
        bytes_left -= size
    return _Plan(first, sketched, groups)


def _is_sketched(layer: LayerInput, settings: CalibrationSettings) -> bool:
    return layer.d_in > max(_SPARE * settings.width, settings.widest if settings.mode == "thorough" else 0)


def _check_finite(matrices: Mapping[str, Mapping[Kind, Tensor]]) -> None:
    for name, of_kind in matrices.items():
        if not all(torch.isfinite(C.sum()) for C in of_kind.values()):
            raise MergeError(
                "Inputs of a layer hold values that are not finite.",
                module=name,
                remedy="check that the model and each LoRA work; lower the strengths, or use another dtype",
            )
