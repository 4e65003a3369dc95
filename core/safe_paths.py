"""Which names stay inside a folder: those of files come from graphs and recipes, and these may be a stranger's."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath


def relative(name: str) -> bool:
    """Whether a name leads down from where it starts: no root, no drive, no ``..``, on any system."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    return bool(posix.name) and not (windows.anchor or posix.anchor or ".." in windows.parts or "\0" in name)


def inside(folder: Path, name: str) -> bool:
    """Whether a file of this name would lie inside the folder, where its parents are links too."""
    return relative(name) and (folder / name).parent.resolve().is_relative_to(folder.resolve())
