"""Parsers of command line arguments: inputs with weights, layer rules, settings. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..core.merge.layer_rules import LayerRule


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


def parse_layer_rules(texts: Iterable[str], count: int) -> list[LayerRule]:
    """Parse the values of ``--module-weight``, see `core.merge.layer_rules`.

    Args:
        count: Number of LoRAs.
    """
    from ..core.errors import MergeError
    from ..core.merge.layer_rules import read_layer_rules

    try:
        return read_layer_rules(texts, count)
    except MergeError as error:
        raise typer.BadParameter(" ".join(str(error).split())) from None


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
