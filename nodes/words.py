"""The words that call for each LoRA in a prompt: typed on a node, with the LoRA, or found in its file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from comfy_api.latest import io

from ..core.adapter import Adapter
from ..core.errors import MergeError
from ..core.formats.file_info import file_info
from ..core.formats.sidecar import trigger_words
from ..core.train.prompts import distinct_words
from .graph_lora import GraphLora


def words_input(tooltip: str = "", **options: Any) -> Any:
    """One line of words per LoRA.

    Args:
        tooltip: Sentences before the common ones.
        options: Options of the input.
    """
    return io.String.Input(
        "words",
        default="",
        multiline=True,
        tooltip=f"{tooltip} One line per LoRA, in their order: the words that call for it in a prompt, separated by "
        "commas. For an empty line those of Load LoRA or the trigger words in the file are used.".strip(),
        **options,
    )


def words_of_loras(words: str, loras: Sequence[GraphLora]) -> list[list[str]]:
    """Return the words of each LoRA: of its line, else of the LoRA itself, else the trigger words in its file.

    Words in two files are left out, see `distinct_words`.

    Raises:
        MergeError: More lines than LoRAs.
    """
    lines = words.rstrip().splitlines()
    if len(lines) > len(loras):
        raise MergeError(
            "There are more lines of words than LoRAs.",
            expected=f"{len(loras)} lines, one per LoRA",
            found=f"{len(lines)} lines",
            remedy="put all words of a LoRA on one line, separated by commas",
        )
    lines += [""] * (len(loras) - len(lines))
    given = [split_words(line) or list(lora.words) for line, lora in zip(lines, loras, strict=True)]
    found = [() if own else _words_in_file(lora) for own, lora in zip(given, loras, strict=True)]
    return distinct_words(given, found)


def split_words(text: str) -> list[str]:
    """Split words at commas."""
    return [word.strip() for word in text.split(",") if word.strip()]


def _words_in_file(lora: GraphLora) -> tuple[str, ...]:
    if isinstance(lora.content, Path):
        return trigger_words(lora.content)
    return file_info(lora.content.metadata).words if isinstance(lora.content, Adapter) else ()
