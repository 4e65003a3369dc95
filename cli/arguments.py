"""What users type, as values: inputs with weights, patterns with factors, settings by name. No torch here."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import typer


def parse_input(text: str) -> dict[str, Any]:
    """``FILE``, ``FILE:WEIGHT`` or ``FILE:WEIGHT:TEXT_ENCODER_WEIGHT`` as an entry of a recipe.

    A colon that is part of the path (``C:\\loras\\a.safetensors``, or a file that exists under that name) stays there.
    """
    path, weights = text, []
    while len(weights) < 2 and not Path(path).exists():
        head, colon, tail = path.rpartition(":")
        number = _number(tail)
        if not colon or not head:
            break
        if number is None:
            if "/" in tail or "\\" in tail or len(head) == 1:  # a drive letter's colon
                break
            raise typer.BadParameter(
                f"{text!r}: {tail!r} is not a number. Write FILE:WEIGHT, e.g. style.safetensors:0.8"
            )
        path, weights = head, [number, *weights]
    return {"path": path, **dict(zip(("weight", "text_encoder_weight"), weights, strict=False))}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def parse_module_weight(text: str) -> tuple[int | None, str, float]:
    """``PATTERN=FACTOR`` for every input, ``N:PATTERN=FACTOR`` for the N-th: ``(N or None, pattern, factor)``."""
    match = re.fullmatch(r"(?:(\d+):)?(.+)=([^=]+)", text)
    factor = _number(match[3]) if match else None
    if match is None or factor is None:
        raise typer.BadParameter(
            f"{text!r} is not [N:]PATTERN=FACTOR, e.g. '*attn2*=0.5', or '1:*attn2*=0.5' for the first LoRA only"
        )
    return (int(match[1]) if match[1] else None), match[2], factor


def parse_setting(text: str) -> tuple[str, str]:
    """``NAME=VALUE``."""
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise typer.BadParameter(f"{text!r} is not NAME=VALUE, e.g. density=0.3")
    return name.strip().replace("-", "_"), value.strip()


def add_module_weights(data: dict[str, Any], texts: Iterable[str]) -> None:
    """Enter ``--module-weight`` options into a recipe's data."""
    for text in texts:
        n, pattern, factor = parse_module_weight(text)
        if n is None:
            table = data.setdefault("module_weights", {})
        elif 1 <= n <= len(data["inputs"]):
            table = data["inputs"][n - 1].setdefault("module_weights", {})
        else:
            raise typer.BadParameter(f"{text!r}: there is no LoRA number {n}, only {len(data['inputs'])}")
        table[pattern] = factor
