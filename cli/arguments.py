"""Parsers of command line arguments: inputs with weights, layer rules, settings. Loads no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
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


def rule_to_keep(text: str) -> str:
    """The rule for layer weights that leaves out all layers but those of ``[N:]PATTERN[,PATTERN]``."""
    number, colon, pattern = text.rpartition(":")
    return f"{number}{colon}!{pattern.replace(' ', '')}=0"


def parse_per_lora(texts: Sequence[str], loras: int, option: str) -> list[str]:
    """Parse an option that is given per LoRA: ``N:VALUE`` for the N-th LoRA, or once for every LoRA, in order.

    Args:
        texts: The values as typed. loras: Number of LoRAs. option: Name of the option, for errors.

    Returns:
        A value per LoRA, ``""`` for those without one.
    """
    matches = [re.fullmatch(r"(\d+):(.*)", text, re.DOTALL) for text in texts]
    if not any(matches):
        if texts and len(texts) != loras:
            raise typer.BadParameter(
                f"{loras} LoRAs and {len(texts)} times {option}: give one for every LoRA, or N:VALUE for the N-th."
            )
        return list(texts) or [""] * loras
    values = [""] * loras
    for text, match in zip(texts, matches, strict=True):
        number = int(match[1]) if match else 0
        if match is None or not 1 <= number <= loras or values[number - 1]:
            raise typer.BadParameter(
                f"{option} {text!r}: write N:VALUE with N from 1 to {loras}, the number of a LoRA, once for each."
            )
        values[number - 1] = match[2]
    return values


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
