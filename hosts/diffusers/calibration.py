"""Measuring the statistics of a calibrated merge on a diffusers pipeline."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

from ...core.adapter import Adapter, is_text_encoder
from ...core.digest import identity
from ...core.layers.align import align
from ...core.merge.statistics import Statistics
from ...core.mole.attach import attach
from ...core.mole.mixture import Mixture
from ...core.mole.router import check_concepts
from ...core.progress import Progress
from ...core.train import prompts_for
from ...core.train.frozen import frozen
from ...core.train.measure import CalibrationSettings, measure_statistics
from .denoiser import PipelineDenoiser
from .layer_names import key_map
from .mixing import experts, model_of


def calibrate_pipeline(
    pipe: Any,
    adapters: Sequence[Adapter],
    concepts: Sequence[Sequence[str]],
    texts: Sequence[str] = (),
    settings: CalibrationSettings | None = None,
    *,
    strengths: Sequence[float] = (),
    size: tuple[int, int] | None = None,
    guidance: float | None = None,
    paint_steps: int = 12,
    progress: Progress | None = None,
) -> Statistics:
    """What the layers of a pipeline's model see, by which LoRAs a prompt names; the pipeline is left as it was.

    Layers of text encoders are not measured, nor are they at work: a calibrated merge gives them the plain SVD of the
    sum.

    Args:
        pipe: See `PipelineDenoiser` for those that are supported.
        adapters: The LoRAs of the merge, as loaded.
        concepts: Per LoRA, the words that name it in a prompt. texts: Prompts to measure on, see `prompts_for`.
        settings: How widely to measure.
        strengths: The weights of the merge; default 1.
        size, guidance, paint_steps: Of the pictures that are painted, see `PipelineDenoiser`.
        progress: Called with (done, in all, what is going on). May raise to cancel.

    Raises:
        MergeError: LoRAs of another model, words that do not fit, or pictures that are not finite.
    """
    check_concepts(concepts, len(adapters))
    prompts = prompts_for(concepts, texts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*are of text encoders")
        mixture = Mixture(tuple(experts(pipe, adapters)), strengths=tuple(strengths))
    model = model_of(pipe)
    paths = _paths(align(adapters, key_map=key_map), adapters, {path for path, _ in model.named_modules() if path})
    with frozen(pipe.components.values()), attach(model, mixture) as attachment:
        denoiser = PipelineDenoiser(pipe, [p.text for p in prompts], size=size, guidance=guidance, steps=paint_steps)
        hashes = list(map(identity, adapters))
        return measure_statistics(
            attachment, denoiser, prompts, paths, settings,
            adapters=hashes, strengths=mixture.strengths, progress=progress,
        )  # fmt: skip


def _paths(aligned: Sequence[Adapter], adapters: Sequence[Adapter], layers: set[str]) -> dict[str, str]:
    """Module name of the merge -> path of its layer in the model."""
    names = [name for name in dict.fromkeys(n for a in aligned for n in a.modules) if not is_text_encoder(name)]
    known = key_map(adapters)
    found: dict[str, str] = {}
    for name in names:
        targets = [name, *(piece.target for piece in known.get(name, ()))]
        paths = [path for target in targets for path in (target, target.partition(".")[2]) if path in layers]
        found[name] = paths[0]  # `experts` has refused LoRAs of other models; the parts of a fused layer share an input
    return found
