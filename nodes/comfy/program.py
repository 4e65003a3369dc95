"""ComfyUI as the program around a node: its folders, its progress bar, its page."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.utils
import folder_paths
import numpy as np
import torch
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from server import PromptServer
from torch import Tensor

from ...core.errors import FormatError, SaveError
from ...core.safe_paths import is_inside, is_safe_name

_TELL_EVERY = 0.5  # seconds

LORAS, GATES = "loras", "legomole_gates"  # kinds of model files, and the names of their folders beside each other
OUTPUT = "output"  # ComfyUI's folder for what nodes make
folder_paths.folder_names_and_paths.setdefault(GATES, ([str(Path(folder_paths.models_dir) / GATES)], {".safetensors"}))


def names(kind: str) -> list[str]:
    """What a loading node offers: the files of a kind's folders."""
    return folder_paths.get_filename_list(kind)


def lora_path(name: str) -> Path:
    """The file behind a LoRA's name."""
    return path_of(name, LORAS)


def path_of(name: str, kind: str) -> Path:
    """The file behind a name of `names`."""
    path = folder_paths.get_full_path(kind, name) if is_safe_name(name) else None
    if path is None:
        raise FormatError(
            "There is no such LoRA." if kind == LORAS else "There are no such gates.",
            file=name,
            expected=f"a file in ComfyUI's {kind} folders",
            remedy="refresh the page, or choose another file",
        )
    return Path(path)


def fingerprint(name: str | None, kind: str) -> object:
    """Changes when the file changes; always for a name that comes from another node, not known before that has run."""
    if name is None:
        return float("nan")
    status = path_of(name, kind).stat()
    return status.st_mtime_ns, status.st_size


def unfinished_folder() -> Path:
    """Where interrupted trainings wait to be taken up."""
    return Path(folder_paths.get_user_directory()) / "legomole" / "unfinished"


def save_path(prefix: str, kind: str = LORAS) -> Path:
    """A new file in a kind's folder, numbered like those of the stock save nodes: ``prefix_00001_.safetensors``.

    Args:
        prefix: Name, with a subfolder if wanted; ``%year%`` and the like are filled in.
        kind: `LORAS`, `GATES`, or `OUTPUT` for a page (``.html``).

    Raises:
        SaveError: The place is outside that folder, or the subfolder cannot be made.
    """
    output = kind == OUTPUT
    folder = Path(folder_paths.get_output_directory() if output else folder_paths.get_folder_paths(kind)[0])
    if not is_inside(folder, prefix):
        what = {LORAS: "A LoRA", GATES: "Gates", OUTPUT: "A report"}[kind]
        raise SaveError(
            f"{what} can only be saved inside the {kind} folder.",
            file=prefix,
            expected="a name like merged or styles/merged",
            remedy="give a relative name without .., through no link that leads out of the folder",
        )
    try:
        target, name, counter, *_ = folder_paths.get_save_image_path(prefix, str(folder))
    except OSError as error:
        raise SaveError("The folder cannot be made.", file=folder / prefix, found=error.strerror) from error
    return Path(target) / f"{name}_{counter:05}_{'.html' if output else '.safetensors'}"


def progress() -> Callable[[int, int, str], None]:
    """ComfyUI's progress bar for `merge`; raises when the user cancels."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int, name: str) -> None:
        nonlocal bar
        comfy.model_management.throw_exception_if_processing_interrupted()
        if total != bar.total or done < bar.current:  # another piece of work: a bar shows only what is past its last
            bar = comfy.utils.ProgressBar(total)
        bar.update_absolute(done, total)

    return report


def told_progress() -> Callable[[int, int, str], None]:
    """`progress` that also writes on the node what is going on, now and then."""
    bar, told = progress(), 0.0

    def report(done: int, total: int, what: str) -> None:
        nonlocal told
        bar(done, total, what)
        if time.monotonic() - told > _TELL_EVERY or done == total:
            told = time.monotonic()
            _write(f"{what}, {done} of {total}")

    return report


def show(text: str) -> ui.PreviewText:
    """Write a text on the node that runs, where its user looks; the return value puts it into the history too."""
    _write(text)
    return ui.PreviewText(text)


def _write(text: str) -> None:
    running = get_executing_context()
    if running is not None:
        PromptServer.instance.send_progress_text(text, running.node_id)


def picture(image: Any) -> Tensor:
    """A Pillow image as an IMAGE: ``(1, height, width, 3)`` in 0 .. 1."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255.0)[None]
