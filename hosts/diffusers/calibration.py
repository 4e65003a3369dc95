"""Measure the statistics of a calibrated merge on a diffusers pipeline."""

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
from .mixing import denoising_model, experts


def calibrate_pipeline(
    pipe: Any,
    adapters: Sequence[Adapter],
    concepts: Sequence[Sequence[str]],
    texts: Sequence[str] = (),
    settings: CalibrationSettings | None = None,
    *,
    size: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Statistics:
    """Measure the inputs of a pipeline's layers, per set of adapters that a prompt names. The pipeline stays unchanged.

    Layers of text encoders are not measured, and the adapters' updates of them are not applied: a calibrated merge uses
    the plain SVD of the sum for them. The adapters are measured at strength 1, whatever their weights in the merge.

    Args:
        pipe: The pipeline; `PipelineDenoiser` lists the supported classes.
        adapters: The adapters of the merge, as loaded.
        concepts: Per adapter, the words that name it in a prompt.
        texts: Prompts to measure on, see `prompts_for`.
        settings: Measurement settings; default `CalibrationSettings()`.
        size: Height and width in pixels of the images that the latents belong to, see `PipelineDenoiser`.
        progress: Called with (passes done, passes in all, description). May raise an exception to cancel.

    Raises:
        MergeError: The adapters are for another model, the words do not fit, or inputs are not finite.
    """
    check_concepts(concepts, len(adapters))
    prompts = prompts_for(concepts, texts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*belong to text encoders")
        mixture = Mixture(tuple(experts(pipe, adapters)))
    model = denoising_model(pipe)
    paths = _paths(align(adapters, key_map=key_map), adapters, {path for path, _ in model.named_modules() if path})
    with frozen(pipe.components.values()), attach(model, mixture) as attachment:
        denoiser = PipelineDenoiser(pipe, [p.text for p in prompts], size=size)
        hashes = list(map(identity, adapters))
        return measure_statistics(
            attachment, denoiser, prompts, paths, settings, adapters=hashes, progress=progress
        )  # fmt: skip


def _paths(aligned: Sequence[Adapter], adapters: Sequence[Adapter], layers: set[str]) -> dict[str, str]:
    """Module name in the merge -> path of its layer in the model."""
    names = [name for name in dict.fromkeys(n for a in aligned for n in a.modules) if not is_text_encoder(name)]
    pieces = key_map(adapters)
    path_of: dict[str, str] = {}
    for name in names:
        targets = [name, *(piece.target for piece in pieces.get(name, ()))]
        paths = [path for target in targets for path in (target, target.partition(".")[2]) if path in layers]
        # there is one: `experts` has refused adapters of other models. The pieces of a fused layer share an input.
        path_of[name] = paths[0]
    return path_of
