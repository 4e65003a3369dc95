"""Measure the statistics for a calibrated merge: inputs of layers on the model's own images, by kind of prompt.

Source: RegMean, arXiv:2212.09849, for the least squares of `methods.calibrated.Calibrated`.
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
from .examples import target_gates
from .prompts import Prompt
from .second_moments import find_shared_inputs, record_second_moments

_MIN_TIME = 0.05  # times are drawn from here to 1: closer to 0 there is almost no noise to predict
MAX_MOMENT_BYTES = 2 << 30  # second moments on the model's device at a time; if more, images are passed again


class CalibrationSettings(BaseModel):
    """Settings of measuring statistics. The same settings, model and LoRAs give the same statistics.

    Args:
        samples: Number of images sampled for each kind of prompt: one for every LoRA alone, for every group that
            prompts name together, and for none.
        noised: Number of times each image is noised and passed to the model.
        batch: Number of images at a time.
        compose: Factor on LoRAs that a prompt names together.
        widest: Layers with wider inputs are left out: the second moments of an input of width d are d^2 values per kind
            of prompt, a quarter of a gigabyte at 8192.
        seed: Random seed.
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
    """Sample images for each kind of prompt with the LoRAs it names, and measure the inputs of layers on them.

    Layers that read the very same tensor (the three projections of an attention) are measured once, and share their
    second moments in the result. These are summed in float32 on the model's device, some layers at a time, and kept on
    the CPU. Layers that the model does not use, or that are too wide, are left out.

    Args:
        attachment: The LoRAs on the model, as a mixture; its gates are held by this function.
        denoiser: Runs that model; its prompts are `prompts`, in order.
        prompts: See `train.prompts_for`: some that name each LoRA alone, some that name several, some that name none.
        modules: Name in the statistics -> path of the layer in the model.
        settings: Default `CalibrationSettings()`.
        adapters: sha256 of the LoRAs' files, in the mixture's order, for the statistics' file.
        strengths: Strengths of the LoRAs on the model, for the statistics' file.
        progress: Called with (images done, total, description). May raise an exception to cancel.

    Raises:
        MergeError: A LoRA that no prompt names alone, no layer that can be measured, or inputs that are not finite.
    """
    settings = settings or CalibrationSettings()
    kinds: dict[tuple[int, ...], list[int]] = {}
    for i, prompt in enumerate(prompts):
        kinds.setdefault(prompt.named, []).append(i)
    missing = [i for i in range(attachment.bank.experts) if (i,) not in kinds]
    if missing:
        raise MergeError(
            f"No prompt names LoRA number {missing[0] + 1} alone, so its own effect cannot be measured.",
            remedy="add prompts that name it and no other LoRA, or leave the prompts to legomole",
        )
    layers = {name: attachment.model.get_submodule(path) for name, path in modules.items()}
    plan = _plan(attachment, denoiser, layers, settings)
    counter = _ProgressCounter(progress, len(kinds) * settings.samples * (1 + settings.noised * len(plan.groups)))
    measured: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for n, (named, members) in enumerate(sorted(kinds.items())):
        generator = torch.Generator().manual_seed(settings.seed + n)
        order = torch.randperm(max(settings.samples, len(members)), generator=generator).tolist()
        drawn = [members[i % len(members)] for i in order[: settings.samples]]
        gates = target_gates([Prompt("", named)], attachment.bank.experts, settings.compose)[0]
        with torch.no_grad(), attachment.hold(gates):
            batches = list(_noised_batches(denoiser, drawn, settings, generator, n, counter))
            of_kind: dict[str, Tensor] = {}
            for group in plan.groups:
                with record_second_moments({name: layers[name] for name in group}) as moments:
                    for noisy, t, batch in batches:
                        denoiser.predict(noisy, t, batch)
                        counter.add(len(batch), "measuring")
                of_kind |= {name: C.value.cpu() for name, C in moments.items()}
        measured[named] = of_kind
        _check_finite(of_kind)
    statistics = {
        name: ModuleStatistics(
            {named[0]: of_kind[name] for named, of_kind in measured.items() if len(named) == 1},
            {named: of_kind[name] for named, of_kind in measured.items() if len(named) > 1},
            measured[()][name] if () in measured else None,
        )
        for group in plan.groups
        for name in group
    }
    metadata = {
        "settings": json.dumps(settings.model_dump()),
        "prompts": json.dumps([prompt.text for prompt in prompts]),
    }
    by_name = {name: statistics[first] for name, first in plan.first.items()}
    return Statistics(by_name, tuple(adapters), tuple(strengths), metadata)


@dataclass(frozen=True)
class _Plan:
    """Which layers are measured together.

    Args:
        first: Name -> the first layer that reads the same input. Layers that the model does not use, or whose inputs
            are too wide, are left out.
        groups: Those first layers, in groups that are measured at a time.
    """

    first: Mapping[str, str]
    groups: Sequence[Sequence[str]]


def _plan(
    attachment: Attachment, denoiser: Denoiser, layers: Mapping[str, nn.Module], settings: CalibrationSettings
) -> _Plan:
    """Sample one image (any will do) to find out which layers read which input."""
    with torch.no_grad(), attachment.hold([0.0] * attachment.bank.experts):
        latents = denoiser.sample([0], settings.seed)
        with find_shared_inputs(layers) as inputs:
            denoiser.predict(latents.cpu(), torch.full((1,), 0.5), [0])
    first: dict[str, str] = {}
    reader_of: dict[object, str] = {}
    usable = {name: x for name, x in inputs.items() if x.d_in <= settings.widest}
    for name in (name for name in layers if name in usable):
        first[name] = reader_of.setdefault(usable[name].tensors, name)
    groups: list[list[str]] = []
    bytes_left = 0
    for name in dict.fromkeys(first.values()):
        size = 4 * usable[name].d_in ** 2
        if size > bytes_left:
            groups.append([])
            bytes_left = MAX_MOMENT_BYTES
        groups[-1].append(name)
        bytes_left -= size
    if not groups:
        raise MergeError(
            "None of the layers can be measured.",
            module=name_some(layers),
            expected=f"layers that the model uses for these prompts, with inputs of at most {settings.widest} features",
            found=f"{len(layers) - len(inputs)} that it does not use, {len(inputs)} with wider inputs",
        )
    return _Plan(first, groups)


class _ProgressCounter:
    """Counts images and reports progress."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self.progress, self.total, self.count = progress, total, 0

    def add(self, images: int, description: str) -> None:
        self.count += images
        if self.progress is not None:
            self.progress(self.count, self.total, description)


def _noised_batches(
    denoiser: Denoiser,
    drawn: Sequence[int],
    settings: CalibrationSettings,
    generator: torch.Generator,
    kind: int,
    counter: _ProgressCounter,
) -> Iterator[tuple[Tensor, Tensor, list[int]]]:
    """The model's own images for the `drawn` prompts, noised: latents, times and prompts, batch by batch."""
    for start in range(0, len(drawn), settings.batch):
        batch = list(drawn[start : start + settings.batch])
        clean = denoiser.sample(batch, settings.seed + 1000 * kind + start).cpu()
        counter.add(len(batch), "sampling")
        for _ in range(settings.noised):
            t = _MIN_TIME + (1 - _MIN_TIME) * torch.rand(len(batch), generator=generator)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            yield denoiser.noised(clean, t, noise).cpu(), t, batch


def _check_finite(moments: Mapping[str, Tensor]) -> None:
    for name, C in moments.items():
        if not torch.isfinite(C.sum()):
            raise MergeError(
                "Images that the model sampled hold values that are not finite.",
                module=name,
                remedy="check that the model and each LoRA give images; lower the strengths, or use another dtype",
            )
