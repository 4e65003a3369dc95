"""ComfyUI as the program around a node: its folders, its progress bar, its page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath, PureWindowsPath

import comfy.model_management
import comfy.utils
import folder_paths
from comfy_api.latest import ui
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..core.errors import FormatError, SaveError


def lora_names() -> list[str]:
    """What Load LoRA offers: the files of the loras folders."""
    return folder_paths.get_filename_list("loras")


def lora_path(name: str) -> Path:
    """The file behind a name of `lora_names`."""
    path = folder_paths.get_full_path("loras", name)
    if path is None:
        raise FormatError(
            "There is no such LoRA.",
            file=name,
            expected="a file in ComfyUI's loras folders",
            remedy="refresh the page, or choose another file",
        )
    return Path(path)


def save_path(prefix: str) -> Path:
    """A new file in the loras folder, numbered like those of the stock save nodes: ``prefix_00001_.safetensors``.

    Args:
        prefix: Name, with a subfolder if wanted; ``%year%`` and the like are filled in.

    Raises:
        SaveError: The place is outside the loras folder, or the subfolder cannot be made.
    """
    folder = Path(folder_paths.get_folder_paths("loras")[0])
    windows, posix = PureWindowsPath(prefix), PurePosixPath(prefix)
    inside = posix.name and not (windows.anchor or posix.anchor or ".." in windows.parts or "\0" in prefix)
    if not inside or not (folder / prefix).parent.resolve().is_relative_to(folder.resolve()):
        raise SaveError(
            "A LoRA can only be saved inside the loras folder.",
            file=prefix,
            expected="a name like merged or styles/merged",
            remedy="give a relative name without .., through no link that leads out of the folder",
        )
    try:
        target, name, counter, *_ = folder_paths.get_save_image_path(prefix, str(folder))
    except OSError as error:
        raise SaveError("The folder cannot be made.", file=folder / prefix, found=error.strerror) from error
    return Path(target) / f"{name}_{counter:05}_.safetensors"


def progress() -> Callable[[int, int, str], None]:
    """ComfyUI's progress bar for `merge`; raises when the user cancels."""
    bar = comfy.utils.ProgressBar(1)

    def report(done: int, total: int, name: str) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        bar.update_absolute(done, total)

    return report


def show(text: str) -> ui.PreviewText:
    """Write a text on the node that runs, where its user looks; the return value puts it into the history too."""
    running = get_executing_context()
    if running is not None:
        PromptServer.instance.send_progress_text(text, running.node_id)
    return ui.PreviewText(text)
