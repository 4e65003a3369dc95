"""What a LoRA file says about itself to people: base model, trigger words, a thumbnail. Read from its header alone."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .adapter import base_model
from .formats.files import read_header
from .json_text import from_json

# What trainers write of the model, and its short name; the first that fits. Letters and digits only, lower case.
_FAMILIES = (
    ("flux2", "Flux 2"),
    ("flux", "Flux"),
    ("stablediffusionxl", "SDXL"),
    ("sdxl", "SDXL"),
    ("pony", "SDXL"),
    ("illustrious", "SDXL"),
    ("stablediffusionv3", "SD 3"),
    ("stablediffusion3", "SD 3"),
    ("sd3", "SD 3"),
    ("stablediffusionv2", "SD 2"),
    ("sdv2", "SD 2"),
    ("sd2", "SD 2"),
    ("stablediffusionv1", "SD 1"),
    ("sdv1", "SD 1"),
    ("sd1", "SD 1"),
    ("qwenimage", "Qwen-Image"),
    ("zimage", "Z-Image"),
    ("hunyuanvideo", "HunyuanVideo"),
    ("wan2", "Wan"),
    ("wan", "Wan"),
    ("ltx", "LTX"),
    ("chroma", "Chroma"),
    ("lumina", "Lumina"),
)
_MOST_WORDS = 5
_LONGEST = 200  # characters of a word or a name
_PICTURE = re.compile(r"data:image/(?:png|jpeg|webp);base64,[A-Za-z0-9+/=\s]+")
_LARGEST_PICTURE = 500_000  # characters


@dataclass(frozen=True)
class About:
    """What a file says about itself.

    Args:
        title: Its title, ``""`` where it has none.
        base: The model it was made for: a short name of the family where it is known, else the file's own words.
        words: Trigger words; where it names none, the most frequent tags of what it was trained on (at most 5).
        thumbnail: A picture as ``data:image/...;base64,...``, or ``""``.
    """

    title: str
    base: str
    words: tuple[str, ...]
    thumbnail: str


def about(metadata: Mapping[str, str]) -> About:
    """The same from a file's metadata; what is not as expected there counts as not said.

    Source: the Stability AI model metadata standard (``modelspec.*``) and sd-scripts (``ss_*``).
    """
    picture = metadata.get("modelspec.thumbnail", "")
    sound = len(picture) <= _LARGEST_PICTURE and _PICTURE.fullmatch(picture)
    return About(
        metadata.get("modelspec.title", "")[:_LONGEST],
        _family(base_model(metadata) or ""),
        _phrases(metadata) or _tags(metadata),
        picture if sound else "",
    )


def of_file(path: Path) -> About:
    """`about` a file; reads no tensor.

    Raises:
        FormatError: It is no sound safetensors file.
    """
    return about(read_header(path).metadata)


def _family(said: str) -> str:
    plain = re.sub(r"[^a-z0-9]", "", said.lower())
    return next((name for key, name in _FAMILIES if key in plain), said[:_LONGEST])


def _phrases(metadata: Mapping[str, str]) -> tuple[str, ...]:
    found = [part.strip()[:_LONGEST] for part in metadata.get("modelspec.trigger_phrase", "").split(",")]
    return tuple(dict.fromkeys(part for part in found if part))


def _tags(metadata: Mapping[str, str]) -> tuple[str, ...]:
    counts: Counter[str] = Counter()
    try:
        for table in from_json(metadata.get("ss_tag_frequency") or "{}").values():
            for tag, count in table.items():
                counts[str(tag).strip()[:_LONGEST]] += int(count)
    except (ValueError, AttributeError, TypeError, OverflowError):  # not what kohya writes
        return ()
    return tuple(tag for tag, _ in counts.most_common(_MOST_WORDS) if tag)
