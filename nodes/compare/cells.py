"""The cells of a comparison: a model prepared in several ways, and images sampled with each."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from ...core.merge.methods import METHODS
from ...core.merge.statistics import Statistics
from ...core.mole.gates import GateSettings
from ...core.mole.trained import TrainedGates
from ...core.pictures.comparison import MIX, PLAIN, Cell, ModelSetup
from ...core.progress import Progress
from ..comfy import mixture
from ..comfy.lora_loader import apply
from ..comfy.sampling import decode, encode, sample
from ..graph_lora import GraphLora, require_all_steps
from ..loaded_loras import LoadedLoras
from ..merge.read_cache import read
from ..merge.recorded import Remedies, merge_loaded
from ..settings import method_from_widgets


@dataclass(frozen=True, eq=False)
class PreparedModel:
    """A model to sample a setup's cells with.

    Args:
        model: The MODEL with the setup's LoRAs.
        positive: Prompt -> its conditioning.
        negative: Conditioning of the negative prompt.
        remark: How the model was prepared, for the report.
        warnings: What was dropped, and other notes.
    """

    model: Any
    positive: Mapping[str, Any]
    negative: Any
    remark: str = ""
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True)
class SamplerSettings:
    """How the images of all cells are sampled and decoded, see `comfy.sampling`.

    Args:
        latent_scale: Factor to resize latents by before they are decoded.
    """

    steps: int
    cfg: float
    sampler: str
    scheduler: str
    latent_scale: float


class ModelPreparer:
    """Prepares a model for each setup of a comparison. The LoRAs are loaded once.

    Args:
        model: The MODEL without LoRAs.
        clip: The CLIP without LoRAs.
        negative: The negative prompt.
        loras: The LoRAs, with their own strengths.
        gates: Trained gates for `MIX`, if any.
        statistics: Statistics for calibrated methods, if any.
        progress: Called during merges, see `core.merge.engine.merge`.
    """

    def __init__(
        self,
        model: Any,
        clip: Any,
        negative: str,
        loras: Sequence[GraphLora],
        *,
        gates: TrainedGates | None,
        statistics: Statistics | None,
        progress: Progress,
    ) -> None:
        self.model, self.clip, self.negative, self.loras = model, clip, negative, loras
        self.gates, self.statistics, self.progress = gates, statistics, progress
        self._loaded: LoadedLoras | None = None
        self._unpatched_conditioning: dict[str, Any] = {}  # text -> conditioning from the CLIP without LoRAs

    def prepare(self, cells: Mapping[ModelSetup, Sequence[Cell]]) -> dict[ModelSetup, PreparedModel]:
        """Prepare a model for every setup, and encode the prompts of its cells. Only text encoders are loaded.

        Raises:
            MergeError: LoRAs, gates or statistics that do not fit, or LoRAs with start or end steps are to be merged.
            FormatError: A file that cannot be read.
        """
        if any(setup.is_merge for setup in cells):
            require_all_steps(self.loras)
        return {setup: self._prepare(setup, [cell.prompt for cell in members]) for setup, members in cells.items()}

    def _prepare(self, setup: ModelSetup, prompts: Sequence[str]) -> PreparedModel:
        start = time.perf_counter()
        model, clip, remark, warnings = self._patch(setup)
        if setup.is_merge:
            remark = f"merged in {time.perf_counter() - start:.1f} s, {remark}"
        is_patched = _patch_count(clip) != _patch_count(self.clip)
        conditioning: dict[str, Any] = {} if is_patched else self._unpatched_conditioning
        for text in (*prompts, self.negative):
            if text not in conditioning:
                conditioning[text] = encode(clip, text)
        return PreparedModel(model, conditioning, conditioning[self.negative], remark, warnings)

    def _patch(self, setup: ModelSetup) -> tuple[Any, Any, str, tuple[str, ...]]:
        """Return MODEL and CLIP with the setup's LoRAs, a remark, and warnings."""
        if setup.method == PLAIN:
            return self.model, self.clip, "", ()
        if self._loaded is None:
            self._loaded = read(self.loras, self.model, self.clip).hashed()
        loras = [
            replace(lora, strength_model=lora.strength_model * factor, strength_clip=lora.strength_clip * factor)
            for lora, factor in zip(self.loras, setup.strength_factors, strict=True)
        ]
        if setup.method == MIX:
            return self._mix(loras, self._loaded)
        statistics = None
        if setup.needs_statistics and self.statistics is not None:
            statistics = self.statistics.of(self._loaded.adapters)
        method = method_from_widgets(METHODS, {"method": setup.merge_method, "rank": setup.rank}, statistics)
        what = f"merging {setup.describe()}"
        lora, report = merge_loaded(
            loras,
            self._loaded,
            method,
            progress=lambda done, total, _: self.progress(done, total, what),
            remedies=Remedies(setup.cap, setup.equalize),
        )
        model, clip = apply(lora, self.model, self.clip, 1.0, 1.0)
        low, high = report.ranks_out
        remark = f"rank {low}{f' to {high}' * (high > low)}, {report.energy_kept:.1%} of the sum's energy kept"
        return model, clip, remark, (*report.dropped, *report.notes)

    def _mix(self, loras: Sequence[GraphLora], loaded: LoadedLoras) -> tuple[Any, Any, str, tuple[str, ...]]:
        settings = GateSettings(granularity="block")
        mix = mixture.build_mixture(
            loras,
            self.model,
            self.clip,
            loaded=loaded,
            gates=self.gates,
            settings=settings,
            steps=[lora.steps for lora in loras],
        )
        clip = mixture.apply_to_clip(mix, self.model, self.clip)
        remark = "trained gates" if mix.mixture.gates.trained else "even gates"
        return mixture.apply_to_model(mix, self.model), clip, remark, (*loaded.dropped, *loaded.notes)


def sample_cells(
    cells: Mapping[ModelSetup, Sequence[Cell]],
    models: dict[ModelSetup, PreparedModel],
    vae: Any,
    latent: Mapping[str, Any],
    settings: SamplerSettings,
    progress: Progress,
) -> tuple[dict[Cell, Tensor], dict[Cell, float]]:
    """Sample every cell.

    Args:
        cells: The cells of each setup.
        models: The model of each setup. It is removed here once its cells are sampled, to free its memory.
        vae: A VAE.
        latent: An empty LATENT.
        settings: Sampler settings.
        progress: Called with (steps done, steps in all, text), over all cells. May raise an exception to cancel.

    Returns:
        Per cell its images ``(B, H, W, 3)`` in 0 .. 1, and the seconds it took.
    """
    images: dict[Cell, Tensor] = {}
    seconds: dict[Cell, float] = {}
    count, steps = sum(map(len, cells.values())), settings.steps
    for setup, members in cells.items():
        prepared = models.pop(setup)
        for cell in members:
            start, number = time.perf_counter(), len(images)
            what = f"cell {number + 1} of {count} ({setup.describe()}): all steps"
            report_step = partial(_report_step, progress, number * steps, count * steps, what)
            report_step(0)
            samples = sample(
                prepared.model,
                prepared.positive[cell.prompt],
                prepared.negative,
                latent,
                seed=cell.seed,
                steps=steps,
                cfg=settings.cfg,
                sampler=settings.sampler,
                scheduler=settings.scheduler,
                progress=report_step,
            )
            images[cell] = decode(vae, samples, settings.latent_scale)
            seconds[cell] = time.perf_counter() - start
    return images, seconds


def _patch_count(clip: Any) -> int:
    """Return the number of patches on the text encoders: a LoRA without text encoder modules adds none."""
    return 0 if clip is None else sum(map(len, clip.patcher.patches.values()))


def _report_step(progress: Progress, steps_before: int, total: int, what: str, done: int) -> None:
    progress(steps_before + done, total, what)
