"""Measure, on the model's own pictures, what a calibrated merge must know: its layers' inputs by what a prompt names.

Source: the recipe behind `methods.calibrated.Calibrated`; RegMean, arXiv:2212.09849, for the least squares.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from ..errors import MergeError, name_some
from ..merge.statistics import ModuleStatistics, Statistics
from ..mole.attach import Attachment
from ..progress import Progress
from .denoiser import Denoiser
from .examples import teacher
from .moments import gather, observe
from .prompts import Prompt

_EARLIEST = 0.05  # times are drawn from here to 1: nearer to 0 nothing is left to predict
AT_ONCE = 2 << 30  # bytes of moments on the model's device at a time; for more, the pictures are shown again


class CalibrationSettings(BaseModel):
    """How the statistics are measured. The same settings, model and LoRAs give the same statistics.

    Args:
        samples: Pictures painted for each kind of prompt: one for every LoRA alone, every group that prompts name
            together, and none. noised: How many times each is noised and shown to the model.
        batch: Pictures at a time.
        compose: How much louder than alone LoRAs are that a prompt names together.
        widest: Layers with wider inputs are left out: the moments of an input of width d are d^2 numbers per kind of
            prompt, a quarter of a gigabyte at 8192.
        seed: Of everything drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(default=24, ge=1)
    noised: int = Field(default=4, ge=1)
    batch: int = Field(default=16, ge=1)
    compose: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    widest: int = Field(default=8192, ge=1)
    seed: int = Field(default=0, ge=0)


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
    """Let the model paint each kind of prompt with the LoRAs it names, and measure what its layers see meanwhile.

    Layers that read the very same tensor (the three projections of an attention) are measured once, and share their
    moments in the result. Moments are summed in float32 where the model computes, some layers at a time, and kept on
    the CPU. A layer that the model does not use, or that is too wide, is not among the statistics.

    Args:
        attachment: The LoRAs on the model, as a mixture; its gates are not asked.
        denoiser: Runs that model; its prompts are `prompts`, in order.
        prompts: See `train.prompts_for`: some that name each LoRA alone, some that name several, some that name none.
        modules: Name in the statistics -> path of the layer in the model.
        settings: Default `CalibrationSettings()`.
        adapters: sha256 of the LoRAs' files, in the mixture's order, for the statistics' file.
        strengths: Of the LoRAs on the model, for the statistics' file.
        progress: Called with (pictures done, in all, what is going on). May raise to cancel.

    Raises:
        MergeError: Prompts that name no LoRA alone, no layer that can be measured, or inputs that are not finite.
    """
    settings = settings or CalibrationSettings()
    kinds: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        kinds.setdefault(prompt.named, []).append(i)
    missing = [i for i in range(attachment.bank.experts) if (i,) not in kinds]
    if missing:
        raise MergeError(
            f"No prompt names LoRA number {missing[0] + 1} alone, so what it is for cannot be measured.",
            remedy="add prompts that name it and no other LoRA, or leave the prompts to legomole",
        )
    layers = {name: attachment.model.get_submodule(path) for name, path in modules.items()}
    plan = _plan(attachment, denoiser, layers, settings)
    told = _Told(progress, len(kinds) * settings.samples * (1 + settings.noised * len(plan.parts)))
    measured: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for n, (named, members) in enumerate(sorted(kinds.items())):
        generator = torch.Generator().manual_seed(settings.seed + n)
        order = torch.randperm(max(settings.samples, len(members)), generator=generator).tolist()
        drawn = [members[i % len(members)] for i in order[: settings.samples]]
        values = teacher([Prompt("", named)], attachment.bank.experts, settings.compose)[0]
        with torch.no_grad(), attachment.hold(values):
            shown = list(_shown(denoiser, drawn, settings, generator, n, told))
            found: dict[str, Tensor] = {}
            for part in plan.parts:
                with gather({name: layers[name] for name in part}) as moments:
                    for noisy, t, chosen in shown:
                        denoiser.predict(noisy, t, chosen)
                        told.add(len(chosen), "measuring")
                found |= {name: moment.value.cpu() for name, moment in moments.items()}
        measured[named] = found
        _check_finite(found)
    statistics = {
        name: ModuleStatistics(
            {named[0]: found[name] for named, found in measured.items() if len(named) == 1},
            {named: found[name] for named, found in measured.items() if len(named) > 1},
            measured[()][name] if () in measured else None,
        )
        for part in plan.parts
        for name in part
    }
    said = {"settings": json.dumps(settings.model_dump()), "prompts": json.dumps([prompt.text for prompt in prompts])}
    moments = {name: statistics[first] for name, first in plan.first.items()}
    return Statistics(moments, tuple(adapters), tuple(strengths), said)


@dataclass(frozen=True)
class _Plan:
    """Which layers are measured together.

    Args:
        first: Name -> the first one that reads the same input. Layers the model does not use, or whose inputs are too
            wide, are left out.
        parts: Those first ones, in groups that are measured at a time.
    """

    first: Mapping[str, str]
    parts: Sequence[Sequence[str]]


def _plan(
    attachment: Attachment, denoiser: Denoiser, layers: Mapping[str, nn.Module], settings: CalibrationSettings
) -> _Plan:
    """Let the model paint one picture (any will do), to see which layers read what."""
    with torch.no_grad(), attachment.hold([0.0] * attachment.bank.experts):
        picture = denoiser.sample([0], settings.seed)
        with observe(layers) as inputs:
            denoiser.predict(picture.cpu(), torch.full((1,), 0.5), [0])
    first: dict[str, str] = {}
    reading: dict[object, str] = {}
    kept = {name: seen for name, seen in inputs.items() if seen.d_in <= settings.widest}
    for name in (name for name in layers if name in kept):
        first[name] = reading.setdefault(kept[name].tensors, name)
    parts: list[list[str]] = []
    room = 0
    for name in dict.fromkeys(first.values()):
        size = 4 * kept[name].d_in ** 2
        if size > room:
            parts.append([])
            room = AT_ONCE
        parts[-1].append(name)
        room -= size
    if not parts:
        raise MergeError(
            "None of the layers can be measured.",
            module=name_some(layers),
            expected=f"layers that the model uses for these prompts, with inputs of at most {settings.widest} numbers",
            found=f"{len(layers) - len(inputs)} that it does not use, {len(inputs)} with wider inputs",
        )
    return _Plan(first, parts)


class _Told:
    """Counts pictures, and tells."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add(self, pictures: int, what: str) -> None:
        self.done += pictures
        if self.progress is not None:
            self.progress(self.done, self.total, what)


def _shown(
    denoiser: Denoiser,
    drawn: Sequence[int],
    settings: CalibrationSettings,
    generator: torch.Generator,
    kind: int,
    told: _Told,
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """The model's own pictures of the `drawn` prompts, noised: latents, times and prompts, batch by batch."""
    for start in range(0, len(drawn), settings.batch):
        chosen = list(drawn[start : start + settings.batch])
        clean = denoiser.sample(chosen, settings.seed + 1000 * kind + start).cpu()
        told.add(len(chosen), "painting")
        for _ in range(settings.noised):
            t = _EARLIEST + (1 - _EARLIEST) * torch.rand(len(chosen), generator=generator)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            yield denoiser.noised(clean, t, noise).cpu(), t, chosen


def _check_finite(found: Mapping[str, Tensor]) -> None:
    for name, C in found.items():
        if not torch.isfinite(C.sum()):
            raise MergeError(
                "The model's own pictures hold numbers that are not finite.",
                module=name,
                remedy="check that the model and each LoRA paint pictures; lower the strengths, or use another dtype",
            )
