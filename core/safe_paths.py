"""Checks that untrusted file names, from node graphs and recipes, stay inside a folder."""

from __future__ import annotations

from pathlib import Path, PurePosixPath, PureWindowsPath


def is_safe_name(name: str) -> bool:
    """Whether a name leads down from its folder: no root, no drive, no ``..``, on any system."""
    windows, posix = PureWindowsPath(name), PurePosixPath(name)
    return bool(posix.name) and not (windows.anchor or posix.anchor or ".." in windows.parts or "\0" in name)


def is_inside(folder: Path, name: str) -> bool:
    """Whether a file of this name lies inside the folder, with symbolic links in its parent folders resolved."""
    return is_safe_name(name) and (folder / name).parent.resolve().is_relative_to(folder.resolve())
