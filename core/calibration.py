"""Measure, on the model's own pictures, what a calibrated merge must know: its layers' inputs by what a prompt names.

Source: the recipe behind `methods.calibrated.Calibrated`; RegMean, arXiv:2212.09849, for the least squares.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from .attach import Attachment
from .errors import MergeError
from .gather import Moment, gather
from .merge import Progress
from .statistics import Moments, Statistics
from .train.denoiser import Denoiser
from .train.examples import teacher
from .train.prompts import Prompt

_EARLIEST = 0.05  # times are drawn from here to 1: nearer to 0 nothing is left to predict


class CalibrationSettings(BaseModel):
    """How the statistics are measured. The same settings, model and LoRAs give the same statistics.

    Args:
        samples: Pictures painted for each kind of prompt: one for every LoRA alone, every group that prompts name
            together, and none. noised: How many times each is noised and shown to the model.
        batch: Pictures at a time.
        compose: How much louder than alone LoRAs are that a prompt names together.
        seed: Of everything drawn.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: int = Field(default=24, ge=1)
    noised: int = Field(default=4, ge=1)
    batch: int = Field(default=16, ge=1)
    compose: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    seed: int = Field(default=0, ge=0)


def calibrate(
    attachment: Attachment,
    denoiser: Denoiser,
    prompts: Sequence[Prompt],
    modules: Mapping[str, str],
    settings: CalibrationSettings | None = None,
    *,
    adapters: Sequence[str] = (),
    progress: Progress | None = None,
) -> Statistics:
    """Let the model paint each kind of prompt with the LoRAs it names, and measure what its layers see meanwhile.

    Args:
        attachment: The LoRAs on the model, as a mixture; its gates are not asked.
        denoiser: Runs that model; its prompts are `prompts`, in order.
        prompts: See `train.prompts_for`: some that name each LoRA alone, some that name several, some that name none.
        modules: Name in the statistics -> path of the layer in the model.
        settings: Default `CalibrationSettings()`.
        adapters: sha256 of the LoRAs' files, in the mixture's order, for the statistics' file.
        progress: Called with (done, in all, what is going on). May raise to cancel.

    Raises:
        MergeError: Prompts that name no LoRA alone, or inputs that are not finite.
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
    measured: dict[tuple[int, ...], dict[str, Tensor]] = {}
    for n, (named, members) in enumerate(sorted(kinds.items())):
        if progress is not None:
            progress(n, len(kinds), "measuring")
        generator = torch.Generator().manual_seed(settings.seed + n)
        values = teacher([Prompt("", named)], attachment.bank.experts, settings.compose)[0]
        drawn = [
            members[i % len(members)] for i in torch.randperm(max(settings.samples, len(members)), generator=generator)
        ]
        with torch.no_grad(), attachment.hold(values.tolist()):
            found = _measured(denoiser, layers, drawn[: settings.samples], settings, generator, n)
        measured[named] = {name: moment.value for name, moment in found.items()}
    if progress is not None:
        progress(len(kinds), len(kinds), "measuring")
    statistics = {
        name: Moments(
            {named[0]: found[name] for named, found in measured.items() if len(named) == 1},
            {named: found[name] for named, found in measured.items() if len(named) > 1},
            measured[()][name] if () in measured else None,
        )
        for name in modules
    }
    for name, moments in statistics.items():
        if not all(torch.isfinite(C.sum()) for C in moments.tensors()):
            raise MergeError(
                "The model's own pictures hold numbers that are not finite.",
                module=name,
                remedy="check that the model and each LoRA paint pictures; lower the strengths, or use another dtype",
            )
    said = {"settings": json.dumps(settings.model_dump()), "prompts": json.dumps([prompt.text for prompt in prompts])}
    return Statistics(statistics, tuple(adapters), said)


def _measured(
    denoiser: Denoiser,
    layers: Mapping[str, torch.nn.Module],
    drawn: Sequence[int],
    settings: CalibrationSettings,
    generator: torch.Generator,
    kind: int,
) -> dict[str, Moment]:
    """Moments of the layers' inputs while the model sees its own pictures of the `drawn` prompts, noised."""
    found: dict[str, Moment] = {}
    for start in range(0, len(drawn), settings.batch):
        chosen = list(drawn[start : start + settings.batch])
        clean = denoiser.sample(chosen, settings.seed + 1000 * kind + start)
        for _ in range(settings.noised):
            t = _EARLIEST + (1 - _EARLIEST) * torch.rand(len(chosen), generator=generator)
            noise = torch.randn(clean.shape, generator=generator).to(clean)
            noisy = denoiser.noised(clean, t.to(clean.device), noise)
            with gather(layers) as moments:
                denoiser.predict(noisy, t.to(clean.device), chosen)
            for name, moment in moments.items():
                found.setdefault(name, Moment()).merge(moment)
    return found
