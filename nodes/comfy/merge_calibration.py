"""Statistics for a merge whose MODEL and CLIP are connected: measured once, then found again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import torch

from ...core.digest import identity
from ...core.errors import LegoMoleError, name_some
from ...core.merge.statistics import Statistics
from ...core.merge.statistics_cache import cache_key, load_cached, store_cached
from ...core.progress import Progress
from ...core.train import prompts_for
from ...core.train.measure import CalibrationSettings
from ..graph_lora import GraphLora
from ..loaded_loras import LoadedLoras
from . import mixture
from .training import SamplingSetup, calibrate, model_digest

KeepBase = Literal["off", "light", "thorough"]
_LATENT_SIZE = 64  # as many tokens as an image of 512 x 512; the layers' inputs hardly depend on the size
_KEPT = 2  # statistics in memory, of those that are too large for the folder
_recent: OrderedDict[str, Statistics] = OrderedDict()


def calibrate_merge(
    loras: Sequence[GraphLora],
    loaded: LoadedLoras,
    words: Sequence[Sequence[str]],
    model: Any,
    clip: Any,
    mode: KeepBase,
    progress: Progress,
) -> tuple[Statistics | None, str]:
    """Measure the statistics of a merge, unless the same LoRAs, words and model were measured before.

    The LoRAs are measured at strength 1, so that another strength needs no new measurement.

    Args:
        loras: The LoRAs of the merge.
        loaded: The same, loaded for the model.
        words: Per LoRA, the words that call for it.
        model, clip: What is connected; ``None`` for nothing.
        mode: See `CalibrationSettings`.
        progress: Called with (passes done, passes in all, description). May raise an exception to cancel; then nothing
            is stored.

    Returns:
        The statistics, ``None`` if nothing could be measured; and a sentence that says why, else ``""``.
    """
    if mode == "off":
        return None, ""
    if unconnected := [name for name, value in (("MODEL", model), ("CLIP", clip)) if value is None]:
        return None, f"connect {' and '.join(unconnected)} to keep the base model as it is elsewhere"
    if missing := [lora.label for lora, own in zip(loras, words, strict=True) if not own]:
        reason = f"no words call for {name_some(missing)}: write one line of words per LoRA"
        return None, f"merged without keeping the base model: {reason}"
    settings = CalibrationSettings(mode=mode)
    try:
        loaded = loaded.hashed()
        adapters = [*map(identity, loaded.adapters)]
        key = cache_key([model_digest(model), adapters, words, _latent_size(model), settings.model_dump()])
        statistics = _recent.get(key) or load_cached(key)
        if statistics is None:
            statistics = calibrate(_setup(loras, loaded, words, model, clip), settings, progress)
            if store_cached(key, statistics) is None:
                _recent[key] = statistics
                while len(_recent) > _KEPT:
                    _recent.popitem(last=False)
        return statistics.of(loaded.adapters), ""
    except LegoMoleError as error:
        return None, f"merged without keeping the base model: {str(error).replace(chr(10), '; ')}"


def _setup(
    loras: Sequence[GraphLora], loaded: LoadedLoras, words: Sequence[Sequence[str]], model: Any, clip: Any
) -> SamplingSetup:
    plain = [replace(lora, strength_model=1.0, strength_clip=1.0) for lora in loras]
    mix = mixture.build_mixture(plain, model, clip, loaded=loaded)
    encoders = mixture.apply_to_clip(mix, model, clip)
    size = _latent_size(model)
    latent = torch.zeros(1, 4, size, size)
    # the guidance scale and the number of steps are of sampling, and nothing is sampled
    return SamplingSetup(mix, model, clip, encoders, latent, prompts_for(words), words, cfg=1.0, steps=1)


def _latent_size(model: Any) -> int:
    """Height and width of the latents; a model of SD3's kind has positions up to a largest size only."""
    network = model.model.diffusion_model
    largest = getattr(network, "pos_embed_max_size", None)
    return _LATENT_SIZE if largest is None else min(_LATENT_SIZE, largest * network.patch_size)
