"""What the metadata of a LoRA file says for people: base model, trigger words, a thumbnail. Reads the header only."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from ..adapter import base_model
from ..json_text import from_json
from .files import read_header

_TRIGGER_KEYS = ("modelspec.trigger_phrase", "ss_trigger_words", "trigger_words")
_MAX_TAGS = 5
_NEARLY_ALL = 0.8  # of the count of the most frequent tag
_GENERIC_TAGS = frozenset((
    "1girl", "1boy", "2girls", "2boys", "solo", "no humans", "looking at viewer", "simple background", "standing",
    "white background", "smile", "upper body", "masterpiece", "best quality", "highres", "general", "safe",
))  # fmt: skip
_MAX_LENGTH = 200  # characters of a trigger word or a name
_THUMBNAIL = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=\s]+")
_MAX_THUMBNAIL = 500_000  # characters


@dataclass(frozen=True)
class FileInfo:
    """What a file says about itself.

    Args:
        title: The title, ``""`` where the file has none.
        base: The base model in the file's own words, shortened: ``sd-xl-v1-base``, ``flux-1-dev``; ``""`` where the
            file does not say.
        words: Words that call for the LoRA in a prompt: its trigger words, or else the tags of nearly all training
            images (at most 5), without tags such as ``1girl`` that name no concept of its own.
        thumbnail: An image as ``data:image/...;base64,...``, or ``""``.
    """

    title: str
    base: str
    words: tuple[str, ...]
    thumbnail: str


def file_info(metadata: Mapping[str, str]) -> FileInfo:
    """The information in a file's metadata; malformed entries count as missing.

    Source: the Stability AI model metadata standard (``modelspec.*``) and sd-scripts (``ss_*``).
    """
    thumbnail = metadata.get("modelspec.thumbnail", "")
    valid = len(thumbnail) <= _MAX_THUMBNAIL and _THUMBNAIL.fullmatch(thumbnail)
    return FileInfo(
        metadata.get("modelspec.title", "")[:_MAX_LENGTH],
        _short_base(base_model(metadata) or ""),
        _trigger_words(metadata) or _common_tags(metadata),
        thumbnail if valid else "",
    )


def read_file_info(path: Path) -> FileInfo:
    """Read `file_info` from a file; reads no tensor.

    Raises:
        FormatError: The file is not a valid safetensors file.
    """
    return file_info(read_header(path).metadata)


def _short_base(base: str) -> str:
    """``stable-diffusion-xl-v1-base/lora`` -> ``sd-xl-v1-base``: what tells families apart comes first."""
    return base.removesuffix("/lora").replace("stable-diffusion", "sd")[:_MAX_LENGTH]


def _trigger_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """The words a file names as its triggers, as text with commas or as a JSON list."""
    words: list[str] = []
    for key in _TRIGGER_KEYS:
        text = metadata.get(key, "")
        try:
            parsed = from_json(text)
        except ValueError:
            parsed = None
        words += [str(word) for word in cast(list[object], parsed)] if isinstance(parsed, list) else text.split(",")
    return tuple(dict.fromkeys(word.strip()[:_MAX_LENGTH] for word in words if word.strip()))


def _common_tags(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """Tags of nearly all training images: what a prompt needs for the LoRA's concept.

    ai-toolkit stores its trigger word as the only tag.
    """
    counts: Counter[str] = Counter()
    try:
        for table in from_json(metadata.get("ss_tag_frequency") or "{}").values():
            for tag, count in table.items():
                counts[str(tag).strip()[:_MAX_LENGTH]] += int(count)
    except (ValueError, AttributeError, TypeError, OverflowError):  # not what kohya writes
        return ()
    ranked = [(tag, count) for tag, count in counts.most_common() if tag and tag.lower() not in _GENERIC_TAGS]
    least = _NEARLY_ALL * max(counts.values(), default=0)
    return tuple(tag for tag, count in ranked if count >= least)[:_MAX_TAGS]
