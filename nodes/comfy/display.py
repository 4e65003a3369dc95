"""What a node shows while it runs and afterwards: a progress bar, a line of text, an image."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import comfy.model_management
import comfy.utils
import numpy as np
import torch
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ...core.merge.findings.finding import lights
from ...core.merge.report import MergeReport
from ...core.progress import Progress

_SHOWN_KEYS = 20  # dropped keys that a report lists
_TEXT_INTERVAL = 0.5  # seconds between lines of text that show progress


def progress_bar() -> Progress:
    """Return a callback that moves ComfyUI's progress bar, and raises an exception when the user cancels."""
    bar = comfy.utils.ProgressBar(1)

    def update(done: int, total: int, name: str) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total != bar.total or done < bar.current:  # a new task: a bar cannot move back
            bar = comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return update


def progress_bar_with_text() -> Progress:
    """Return a callback like that of `progress_bar` which also writes its text on the node, twice a second."""
    update_bar, last_sent = progress_bar(), 0.0

    def update(done: int, total: int, what: str) -> None:
        nonlocal last_sent
        update_bar(done, total, what)
        if time.monotonic() - last_sent > _TEXT_INTERVAL or done == total:
            last_sent = time.monotonic()
            _send_text(f"{what}, {done} of {total}")

    return update


def show_text(text: str) -> ui.PreviewText:
    """Write a text on the node that runs. The return value, given to `NodeOutput`, puts it into the history too."""
    _send_text(text)
    return ui.PreviewText(text)


def with_dropped_first(text: str, dropped: Sequence[str]) -> str:
    """Return a report whose first line is the number of dropped keys, if any: a node shows a few lines only."""
    if not dropped:
        return text
    return f"{len(dropped)} key{'s' * (len(dropped) != 1)} could not be used, see DROPPED below.\n{text}"


def dropped_section(dropped: Sequence[str]) -> list[str]:
    """Return the lines of a report that list dropped keys."""
    if not dropped:
        return []
    lines = [f"    {line}" for line in dropped[:_SHOWN_KEYS]]
    more = len(dropped) - _SHOWN_KEYS
    return [f"  DROPPED ({len(dropped)}):", *lines, *([f"    and {more} more"] if more > 0 else [])]


def text_writer() -> Callable[[str], None]:
    """Return a function that writes a text on the node that is running now, also after it has finished."""
    context = get_executing_context()

    def write(text: str) -> None:
        if context is not None:
            PromptServer.instance.send_progress_text(text, context.node_id)

    return write


def _send_text(text: str) -> None:
    text_writer()(text)


def to_image(picture: Any) -> Tensor:
    """Convert a Pillow image to an IMAGE: ``(1, height, width, 3)`` in 0 .. 1."""
    return torch.from_numpy(np.asarray(picture.convert("RGB"), dtype=np.float32) / 255.0)[None]


_LIGHTS = {"red": "\N{LARGE RED CIRCLE}", "yellow": "\N{LARGE YELLOW CIRCLE}", "green": "\N{LARGE GREEN CIRCLE}"}


def lights_text(report: MergeReport) -> str:
    """A line per LoRA: its traffic light, its name, and the sentence of its most severe finding."""
    rows = lights(report.inputs, report.findings)
    return "\n".join(f"{_LIGHTS[light]} {label}: {text}" for label, light, text in rows)
