"""ComfyUI's folders: files by the name a combo offers, and new files to write."""

from __future__ import annotations

from pathlib import Path, PureWindowsPath

import folder_paths

from ...core.errors import FormatError, SaveError, name_some
from ...core.safe_paths import is_inside, is_safe_name

LORAS, GATES = "loras", "legomole_gates"  # kinds of model files, and the names of their folders
OUTPUT = "output"  # ComfyUI's output folder
folder_paths.folder_names_and_paths.setdefault(GATES, ([str(Path(folder_paths.models_dir) / GATES)], {".safetensors"}))


def file_names(kind: str) -> list[str]:
    """Return the names of all files of a kind, for a combo."""
    return folder_paths.get_filename_list(kind)


def lora_path(name: str) -> Path:
    """Return the path of a LoRA file, see `path_of`."""
    return path_of(name, LORAS)


def path_of(name: str, kind: str) -> Path:
    """Return the path of a file, given its name in a graph, which may come from another computer.

    That is the file of this name in `file_names`, with ``\\`` or ``/``; else the only file with the same last part.

    Raises:
        FormatError: There is no such file, or several.
    """
    namesakes: list[str] = []
    if is_safe_name(name):
        path = folder_paths.get_full_path(kind, name) or folder_paths.get_full_path(kind, name.replace("\\", "/"))
        last_part = PureWindowsPath(name).name  # divides at both kinds of slashes
        namesakes = [] if path else [other for other in file_names(kind) if PureWindowsPath(other).name == last_part]
        path = folder_paths.get_full_path(kind, namesakes[0]) if len(namesakes) == 1 else path
        if path:
            return Path(path)
    raise FormatError(
        "There is no such LoRA." if kind == LORAS else "There are no such gates.",
        file=name,
        expected=f"a file in ComfyUI's {kind} folders",
        found=f"several files of that name: {name_some(namesakes)}" if namesakes else None,
        remedy="refresh the page, or choose another file",
    )


def check_name(name: str | None, kind: str) -> bool | str:
    """Check a file name for a node's `validate_inputs`: ``True`` or the reason why it cannot be used.

    It replaces ComfyUI's check, which knows no names from other computers. ``None``: another node provides the name.
    """
    try:
        return name is None or bool(path_of(name, kind))
    except FormatError as error:
        return str(error)


def fingerprint(name: str | None, kind: str) -> object:
    """Return a value that changes when the file changes, for a node's `fingerprint_inputs`.

    Without a name, because another node provides it and has not run yet, the value always changes.
    """
    if name is None:
        return float("nan")
    status = path_of(name, kind).stat()
    return status.st_mtime_ns, status.st_size


def unfinished_folder() -> Path:
    """Return the folder for the state of interrupted trainings, from which they are resumed."""
    return _own_folder() / "unfinished"


def hashes_file() -> Path:
    """Return the file in which hashes of LoRA files are kept between runs."""
    return _own_folder() / "hashes.json"


def _own_folder() -> Path:
    return Path(folder_paths.get_user_directory()) / "legomole"


def new_path(prefix: str, kind: str = LORAS) -> Path:
    """Return the path of a new file, numbered as the stock save nodes do: ``prefix_00001_.safetensors``.

    Args:
        prefix: File name, optionally with a subfolder; ``%year%`` and similar fields are replaced.
        kind: `LORAS`, `GATES`, or `OUTPUT` for a page (``.html``).

    Raises:
        SaveError: A path outside of that kind's folder, or a subfolder that cannot be made.
    """
    is_page = kind == OUTPUT
    folder = Path(folder_paths.get_output_directory() if is_page else folder_paths.get_folder_paths(kind)[0])
    if not is_inside(folder, prefix):
        what = {LORAS: "A LoRA", GATES: "Gates", OUTPUT: "A report"}[kind]
        raise SaveError(
            f"{what} can only be saved inside the {kind} folder.",
            file=prefix,
            expected="a name like merged or styles/merged",
            remedy="give a relative name without .., and through no link that leads out of the folder",
        )
    try:
        target, name, counter, *_ = folder_paths.get_save_image_path(prefix, str(folder))
    except OSError as error:
        raise SaveError("The folder cannot be made.", file=folder / prefix, found=error.strerror) from error
    return Path(target) / f"{name}_{counter:05}_{'.html' if is_page else '.safetensors'}"
