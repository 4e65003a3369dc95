"""The word router in ComfyUI: gates without training, which open for prompts that contain a LoRA's words."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from ...core.mole.prompt_check import prompt_warnings
from ...core.mole.router import route_gates
from ...core.progress import Progress
from . import display
from .detectors import fitted_detector
from .mixture import ComfyMixture
from .prompt_encoder import text_of

_LOG = logging.getLogger(__name__)
_SHOWN = 4  # prompts whose warnings stay on the node


def with_router(
    mix: ComfyMixture, model: Any, clip: Any, patched: Any, words: Sequence[Sequence[str]], progress: Progress
) -> tuple[ComfyMixture, tuple[str, ...]]:
    """Give a mixture gates that open for prompts with a LoRA's words, see `fitted_detector`.

    Args:
        mix: The mixture, with untrained gates.
        model: The MODEL it was built for.
        clip: The CLIP, as connected.
        patched: The same with the text encoder layers of the LoRAs, which prompts are encoded with.
        words: Per expert, the words or phrases that call for it; an expert without words is always on.
        progress: See `fit_detector`.

    Returns:
        The mixture, and sentences for its report.
    """
    fitted = fitted_detector(mix, model, clip, patched, words, progress=progress)
    settings = mix.mixture.gates.settings
    names = dict.fromkeys(scope.name for scope in mix.bank.scopes.values())
    with torch.inference_mode(False), torch.no_grad():
        gates = route_gates(fitted.detector, settings, names)
        mix.bank.gates = gates.copy()
    return replace(mix, mixture=replace(mix.mixture, gates=gates), routed=True), fitted.notes


def warn_about_prompts(mix: ComfyMixture, model: Any, clip: Any, report: str) -> Any:
    """Return a CLIP that warns if a prompt's words and the gates of the mixture disagree: in the log, and on the node.

    Args:
        mix: The mixture. model: The MODEL it was built for.
        clip: The CLIP or ``None``.
        report: The text that stands on the node, which the warnings are added to.
    """
    gates = mix.mixture.gates
    if clip is None or not gates.trained or gates.detector is None:
        return clip
    write = display.text_writer()
    shown: OrderedDict[str, list[str]] = OrderedDict()
    watched = clip.clone()
    tokenize: Callable[..., Any] = watched.tokenize
    encode: Callable[..., Any] = watched.encode_from_tokens_scheduled
    latest: tuple[str, Any] = "", None

    def tokenize_and_remember(text: str, *args: Any, **kwargs: Any) -> Any:
        nonlocal latest
        latest = text, tokenize(text, *args, **kwargs)
        return latest[1]

    def encode_and_check(tokens: Any, *args: Any, **kwargs: Any) -> Any:
        conditioning = encode(tokens, *args, **kwargs)
        prompt, its_tokens = latest
        if tokens is its_tokens and prompt.strip():
            states, mask = text_of(model, conditioning)
            with torch.no_grad():
                warnings = prompt_warnings(prompt, states.float().cpu(), gates, mix.mixture.labels, mask)
            for warning in warnings:
                _LOG.warning("LegoMoLE: %s", warning)
            shown.pop(prompt, None)
            shown[prompt] = warnings
            while len(shown) > _SHOWN:
                shown.popitem(last=False)
            write("\n".join([report, *(f"  WARNING: {warning}" for lines in shown.values() for warning in lines)]))
        return conditioning

    watched.tokenize, watched.encode_from_tokens_scheduled = tokenize_and_remember, encode_and_check
    return watched
