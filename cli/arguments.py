"""Parsers of command line arguments: inputs with weights, layer rules, settings. Loads no torch."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import typer


def parse_input(text: str) -> dict[str, Any]:
    """Parse ``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT:TEXT_ENCODER_WEIGHT`` into the fields of a recipe's input.

    A colon that belongs to the path stays there: ``C:\\loras\\a.safetensors``, or an existing file of that name.
    """
    path, weights = text, []
    while len(weights) < 2 and not Path(path).exists():
        head, colon, tail = path.rpartition(":")
        number = _to_number(tail)
        if not colon or not head:
            break
        if number is None:
            if "/" in tail or "\\" in tail or len(head) == 1:  # the colon of a drive letter
                break
            raise typer.BadParameter(
                f"{text!r}: {tail!r} is not a number. Write FILE:WEIGHT, e.g. style.safetensors:0.8"
            )
        path, weights = head, [number, *weights]
    return {"path": path, **dict(zip(("weight", "text_encoder_weight"), weights, strict=False))}


def _to_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_layer_rule(text: str) -> tuple[int | None, str, float]:
    """Parse ``[N:]PATTERN=FACTOR`` into (number of the LoRA or ``None`` for all, pattern, factor)."""
    match = re.fullmatch(r"(?:(\d+):)?(.+)=([^=]+)", text)
    factor = _to_number(match[3]) if match else None
    if match is None or factor is None:
        raise typer.BadParameter(
            f"{text!r} is not [N:]PATTERN=FACTOR, e.g. '*attn2*=0.5', or '1:*attn2*=0.5' for the first LoRA only"
        )
    return (int(match[1]) if match[1] else None), match[2], factor


def parse_layer_rules(texts: Iterable[str], count: int) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Parse layer rules; factors of equal patterns are multiplied.

    Args:
        texts: Rules, see `parse_layer_rule`.
        count: Number of LoRAs.

    Returns:
        Pattern -> factor for all LoRAs, and the same for each LoRA.
    """
    for_all: dict[str, float] = defaultdict(lambda: 1.0)
    for_each: list[dict[str, float]] = [defaultdict(lambda: 1.0) for _ in range(count)]
    for text in texts:
        number, pattern, factor = parse_layer_rule(text)
        if number is not None and not 1 <= number <= count:
            raise typer.BadParameter(f"{text!r}: there is no LoRA number {number}, only {count}")
        table = for_all if number is None else for_each[number - 1]
        table[pattern] *= factor
    return dict(for_all), [dict(table) for table in for_each]


def parse_setting(text: str) -> tuple[str, str]:
    """Parse ``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, e.g. starts=4")
    return name.strip().replace("-", "_"), value.strip()


def parse_settings(texts: Iterable[str], options: Mapping[str, str]) -> dict[str, str]:
    """Parse the values of ``--set``.

    Args:
        texts: See `parse_setting`.
        options: Settings that have an option of their own -> that option.
    """
    settings: dict[str, str] = {}
    for text in texts:
        name, value = parse_setting(text)
        if name in options:
            raise typer.BadParameter(f"--set {text}: use the option {options[name]} {value}")
        if name in settings:
            raise typer.BadParameter(f"--set gives {name} twice.")
        settings[name] = value
    return settings
