"""Parsers of the inputs of `train-gates` and `merge --base`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ..core.errors import FormatError
from ..core.json_text import from_json
from .arguments import parse_input, parse_per_lora

if TYPE_CHECKING:
    from ..core.mole.gates import GateSettings
    from ..core.train import FitSettings

_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def parse_expert(text: str) -> tuple[str, float]:
    """Parse ``FILE`` or ``FILE:STRENGTH``."""
    entry = parse_input(text)
    if "text_encoder_weight" in entry:
        raise typer.BadParameter(f"{text!r}: text encoders are not mixed, so a LoRA has one strength here.")
    return entry["path"], entry.get("weight", 1.0)


def parse_words(texts: Sequence[str], loras: int) -> list[list[str]]:
    """Parse the values of ``--words``, one per LoRA, see `parse_per_lora`."""
    if len(texts) != loras:
        raise typer.BadParameter(f"{loras} LoRAs and {len(texts)} times --words: give one for every LoRA.")
    return [split_words(text) for text in parse_per_lora(texts, loras, "--words")]


def split_words(text: str) -> list[str]:
    """Split a list of words or phrases at its commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def parse_size(text: str) -> tuple[int, int]:
    """Parse ``512``, or ``768x512`` for width and height, into (height, width)."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size: write 512, or 768x512 for width and height.")
    width = int(match[1])
    return int(match[2] or width), width


_Settings = TypeVar("_Settings", bound="FitSettings")


def read_settings(
    kind: type[_Settings], training: Mapping[str, Any], gates: Mapping[str, Any]
) -> tuple[_Settings, GateSettings]:
    """Validate the settings of a training and of the gates."""
    from pydantic import ValidationError

    from ..core.mole.gates import GateSettings

    try:
        return kind.model_validate(training), GateSettings.model_validate(gates)
    except ValidationError as error:
        wrong = "; ".join(f"{e['loc'][0]} = {e['input']}: {e['msg']}" for e in error.errors())
        raise typer.BadParameter(f"Invalid settings. {wrong}") from error


def read_texts(path: Path) -> list[Any]:
    """Read the examples of a JSON-lines file: ``{"prompt": .., "completion": ..}`` or ``{"text": ..}`` per line.

    Raises:
        FormatError: A line of another form; names the line.
    """
    examples: list[Any] = []
    for number, line in enumerate(read_lines(path), 1):
        if not line.strip():
            continue
        try:
            entry: Any = from_json(line)
        except ValueError:
            entry = None
        fields = ("prompt", "completion") if isinstance(entry, dict) and "prompt" in entry else ("text",)
        if not isinstance(entry, dict) or not all(isinstance(entry.get(field), str) for field in fields):
            raise FormatError(
                "A line is not an example.",
                file=f"{path}, line {number}",
                expected='{"prompt": "..", "completion": ".."} or {"text": ".."}',
                found=line[:80],
            )
        examples.append((entry["prompt"], entry["completion"]) if "prompt" in entry else entry["text"])
    return examples


def read_lines(path: Path) -> list[str]:
    """Read the lines of a text file. Only a line feed ends a line: JSON may contain Unicode's other line separators."""
    try:
        with path.open(encoding="utf-8") as file:
            return [line.rstrip("\n") for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(
            "The text cannot be read.", file=path, expected="a text file in UTF-8", found=error
        ) from error


def read_pictures(texts: Sequence[str], concepts: Sequence[Sequence[str]]) -> list[tuple[Any, str]]:
    """Read the pictures of every ``N:FOLDER`` with their captions; default: the first words of the N-th LoRA."""
    from PIL import Image

    pictures: list[tuple[Any, str]] = []
    for text in texts:
        match = re.fullmatch(r"(\d+):(.+)", text)
        if match is None or not 1 <= int(match[1]) <= len(concepts):
            raise typer.BadParameter(
                f"{text!r} is not N:FOLDER with N from 1 to {len(concepts)}, the number of a LoRA."
            )
        folder, words = Path(match[2]), concepts[int(match[1]) - 1]
        paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
        if not paths:
            raise FormatError("There are no pictures.", file=folder, expected=f"a folder with {', '.join(_SUFFIXES)}")
        for path in paths:
            described = path.with_suffix(".txt")
            caption = " ".join(read_lines(described)) if described.exists() else words[0]
            try:
                with Image.open(path) as picture:
                    pictures.append((picture.convert("RGB"), caption))
            except Exception as error:  # decoders raise errors of any type
                raise FormatError("The picture cannot be read.", file=path, found=error) from error
    return pictures
