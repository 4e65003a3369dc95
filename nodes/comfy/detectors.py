"""Concept detectors of prompts. Fitting one encodes about a hundred prompts, so the latest ones are kept."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import torch

from ...core.adapter import is_text_encoder
from ...core.digest import digest, identity, some_of
from ...core.progress import Progress
from ...core.train import FittedDetector, fit_detector
from .mixture import ComfyMixture
from .prompt_encoder import ComfyPromptEncoder

_KEPT = 8  # detectors
_detectors: OrderedDict[str, FittedDetector] = OrderedDict()


def fitted_detector(
    mix: ComfyMixture,
    model: Any,
    clip: Any,
    patched: Any,
    words: Sequence[Sequence[str]],
    texts: Sequence[str] = (),
    *,
    progress: Progress,
) -> FittedDetector:
    """Return a detector of the experts' words, fitted now or for an earlier prompt with the same text encoders.

    Args:
        mix: The mixture.
        model: The MODEL it was built for.
        clip: The CLIP, as connected.
        patched: The same with the text encoder layers of the LoRAs, which prompts are encoded with.
        words, texts, progress: See `fit_detector`.
    """
    experts = zip(mix.mixture.experts, mix.text_encoder_weights, strict=True)
    loras = [(identity(expert), weight) for expert, weight in experts if any(map(is_text_encoder, expert.modules))]
    key = repr((mix.base, _identify(clip), loras, [list(row) for row in words], list(texts)))
    fitted = _detectors.get(key)
    if fitted is None:
        with torch.inference_mode(False), torch.no_grad():
            fitted = fit_detector(words, ComfyPromptEncoder(model, patched), texts, progress=progress)
        _detectors[key] = fitted
    _detectors.move_to_end(key)
    while len(_detectors) > _KEPT:
        _detectors.popitem(last=False)
    return fitted


def _identify(clip: Any) -> tuple[str, ...]:
    """Return what tells a CLIP from others, also after its file was loaded again."""
    patcher = clip.patcher
    weights = patcher.model_state_dict()
    patches = str(patcher.patches_uuid) if patcher.patches else ""
    kind = type(clip.cond_stage_model).__name__
    hashed = digest(some_of([weights[name] for name in sorted(weights)]))
    return kind, hashed, patches, repr(clip.layer_idx), repr(clip.tokenizer_options)
