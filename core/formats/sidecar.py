"""Files that other programs put beside a LoRA file: a preview image, and descriptions for people."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..json_text import from_json
from .file_info import read_file_info

_IMAGES = (".png", ".jpg", ".jpeg", ".webp")
_DESCRIPTIONS = (".metadata.json", ".civitai.info")  # the first is the user's own, so its entries come first
_MAX_BYTES = 4 << 20
_MAX_WORDS = 100
_MAX_LENGTH = 300  # characters of a name, word or tag
_MAX_NOTES = 4000  # characters


@dataclass(frozen=True)
class Sidecar:
    """What the files beside a LoRA file say.

    Args:
        title: The model's name, ``""`` where no file says it; likewise the other texts.
        base: The base model.
        words: Trigger words.
        tags: Tags, as a collection is sorted by.
        sha256: SHA-256 of the LoRA file in lower case.
        notes: The user's notes.
    """

    title: str = ""
    base: str = ""
    words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    sha256: str = ""
    notes: str = ""


def preview_image(file: Path) -> Path | None:
    """Return the preview image of a LoRA file: ``a.preview.png`` or ``a.png`` beside ``a.safetensors``."""
    stem = file.with_suffix("")
    candidates = [Path(f"{stem}{middle}{suffix}") for middle in (".preview", "") for suffix in _IMAGES]
    return next((path for path in candidates if path.is_file()), None)


def read_sidecar(file: Path) -> Sidecar:
    """Read the ``.metadata.json`` and ``.civitai.info`` beside a LoRA file; malformed ones count as missing.

    Source: the files of ComfyUI-Lora-Manager (``model_name``, ``base_model``, ``civitai.trainedWords``, ``tags``,
    ``notes``, ``sha256``) and of Civitai's model-version API, as download helpers store it (``baseModel``,
    ``trainedWords``, ``model.name``, ``files[].hashes.SHA256``).
    """
    tables = [table for suffix in _DESCRIPTIONS if (table := _read(Path(f"{file.with_suffix('')}{suffix}")))]
    tables += [table for table in (_table(table, "civitai") for table in tables) if table]
    hashes = (str(_table(entry, "hashes").get("SHA256", "")) for table in tables for entry in _tables(table, "files"))
    return Sidecar(
        title=_first(_texts(tables, "model_name"), _texts([_table(table, "model") for table in tables], "name")),
        base=_first(_texts(tables, "base_model"), _texts(tables, "baseModel")),
        words=_words(tables, "trainedWords"),
        tags=_words([*tables, *(_table(table, "model") for table in tables)], "tags"),
        sha256=_first(_texts(tables, "sha256"), hashes).lower(),
        notes=_first(_texts(tables, "notes"), length=_MAX_NOTES),
    )


def trigger_words(file: Path) -> tuple[str, ...]:
    """Return the trigger words of a LoRA file: those beside it, which people wrote, else those in its metadata.

    Raises:
        FormatError: The file is not a valid safetensors file.
    """
    return read_sidecar(file).words or read_file_info(file).words


def _read(path: Path) -> Mapping[str, Any]:
    try:
        if path.stat().st_size > _MAX_BYTES:
            return {}
        content = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return _as_table(content)


def _as_table(value: object) -> Mapping[str, Any]:
    return cast("Mapping[str, Any]", value) if isinstance(value, dict) else {}


def _table(table: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    return _as_table(table.get(key))


def _tables(table: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = table.get(key)
    return [_as_table(entry) for entry in cast("list[object]", value)] if isinstance(value, list) else []


def _texts(tables: list[Mapping[str, Any]], key: str) -> Iterator[str]:
    return (value.strip() for table in tables if isinstance(value := table.get(key), str))


def _first(*texts: Iterator[str], length: int = _MAX_LENGTH) -> str:
    """Return the first text that is not empty, shortened."""
    return next((text[:length] for group in texts for text in group if text), "")


def _words(tables: list[Mapping[str, Any]], key: str) -> tuple[str, ...]:
    """Return the words of the first list that is not empty. An entry may hold several, separated by commas."""
    for table in tables:
        value = table.get(key)
        entries = cast("list[object]", value) if isinstance(value, list) else []
        words = [word.strip()[:_MAX_LENGTH] for entry in entries if isinstance(entry, str) for word in entry.split(",")]
        if any(words):
            return tuple(dict.fromkeys(word for word in words if word))[:_MAX_WORDS]
    return ()
