"""Warnings for prompts whose words and gates disagree."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .gates import READS_TEXT, GateSet
from .router import concepts_in

_SHUT, _OPEN = 0.3, 0.7  # of the value of an even gate


def prompt_warnings(
    prompt: str, text: Tensor, gates: GateSet, labels: Sequence[str], mask: Tensor | None = None
) -> list[str]:
    """Sentences for users on LoRAs whose gates are nearly shut although the prompt has their words, or the reverse.

    Args:
        prompt: The prompt.
        text: ``(T, F)``, its text conditioning. mask: ``(T,)`` bool, false for padding.
        gates: The gates. There are no warnings for gates that read no text, or whose words are unknown.
        labels: Names of the experts for users.
    """
    detector = gates.detector
    if not prompt.strip() or not gates.trained or detector is None or gates.settings.reads not in READS_TEXT:
        return []
    named = concepts_in([prompt], detector.words)[0].tolist()
    values = gates.values(gates.text_features(text[None], None if mask is None else mask[None]))
    even, mean = gates.settings.even(gates.experts), torch.cat(values).mean(0).detach()
    may_be_shut = gates.settings.activation != "softmax"  # which is even where no concept is named
    warnings: list[str] = []
    for label, words, is_named, value in zip(labels, detector.words, named, mean.tolist(), strict=True):
        if not words:
            continue
        found = f"its gate is {value:.2f} of 1 for the prompt {_shortened(prompt)!r}"
        if is_named and value < _SHUT * even:
            warnings.append(f"{label} is nearly off although the prompt has its words ({', '.join(words)}): {found}")
        elif not is_named and value > _OPEN * even and may_be_shut:
            warnings.append(f"{label} is on although the prompt has none of its words ({', '.join(words)}): {found}")
    return warnings


def _shortened(prompt: str) -> str:
    return prompt if len(prompt) <= 80 else f"{prompt[:77]}.."
