"""Names for unfinished files, a lock for folders, and an atomic swap of folders."""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import sys
import time
import uuid
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_SUFFIX = re.compile(r"[0-9a-f]{32}\.tmp")
_STALE_SECONDS = 24 * 3600


def temporary_name(path: Path) -> Path:
    """A unique name beside `path`: ``.<name>.<32 hexadecimal digits>.tmp``.

    Removes files with such a name for this path that a killed process has left behind, once they are a day old: until
    then their process may still be running.
    """
    stem = f".{path.name[:40]}."  # a name may have 255 bytes, and a character 4 of them
    with suppress(OSError):
        for other in path.parent.iterdir():
            if other.name.startswith(stem) and _SUFFIX.fullmatch(other.name[len(stem) :]):
                with suppress(OSError):
                    if time.time() - other.stat().st_mtime > _STALE_SECONDS:
                        remove(other)
    return path.with_name(f"{stem}{uuid.uuid4().hex}.tmp")


def remove(path: Path) -> None:
    """Remove a file or folder if it exists and permissions allow it."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # on a read-only disk removing a missing file fails too, and would hide the cause
            path.unlink()


@contextmanager
def exclusive_lock(folder: Path) -> Generator[None]:
    """Wait until no other process holds the folder's lock, and hold it during the block.

    The system releases the lock when a process dies. Windows has no locks for folders: there nothing waits.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def swap_folders(new: Path, old: Path) -> bool:
    """Swap two folders in one step, so that no reader sees `old` half written.

    Files of `old` that are missing in `new` are first linked into `new`.

    Returns:
        Whether the folders were swapped. They are not on Windows, where a file system cannot do it, where `old` is a
        symbolic link, and where there are folders inside.
    """
    if old.is_symlink():
        return False
    try:
        for entry in old.iterdir():
            if not (new / entry.name).exists():
                os.link(entry, new / entry.name, follow_symlinks=False)
        shutil.copymode(old, new)
        names, library = (os.fsencode(new.absolute()), os.fsencode(old.absolute())), ctypes.CDLL(None)
        if sys.platform == "darwin":
            return library.renamex_np(*names, 2) == 0  # RENAME_SWAP
        return library.renameat2(-100, names[0], -100, names[1], 2) == 0  # AT_FDCWD twice, RENAME_EXCHANGE
    except (OSError, AttributeError, TypeError, NotImplementedError):
        return False
