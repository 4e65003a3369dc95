"""Names for what is not finished yet, and the files of a folder changed by one process at a time."""

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

_NAME = re.compile(r"[0-9a-f]{32}\.tmp")
_STALE = 24 * 3600  # seconds


def temporary_name(path: Path) -> Path:
    """A name of its own beside `path`: ``.<name>.<32 hexadecimal digits>.tmp``.

    What a process that was killed left under such a name for this path is removed when it is a day old: until then its
    owner may still be at work.
    """
    stem = f".{path.name[:40]}."  # a name may have 255 bytes, and a character 4 of them
    with suppress(OSError):
        for other in path.parent.iterdir():
            if other.name.startswith(stem) and _NAME.fullmatch(other.name[len(stem) :]):
                with suppress(OSError):
                    if time.time() - other.stat().st_mtime > _STALE:
                        remove(other)
    return path.with_name(f"{stem}{uuid.uuid4().hex}.tmp")


def remove(path: Path) -> None:
    """Take a file or folder away if it is there and that is allowed."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # on a read-only disk even the removal of nothing fails, and would hide the cause
            path.unlink()


@contextmanager
def exclusive_lock(folder: Path) -> Generator[None]:
    """Wait until no other process is inside such a block for the folder.

    The system lets go of the lock when a process dies. Windows does not lock folders: there nobody waits.
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
    """Let two folders change places in one step, so that nobody ever finds `old` half written.

    What `old` holds beside the files of `new` is linked into `new` first.

    Returns:
        Whether that was possible. It is not on Windows, where a file system cannot do it, for a link to a folder, and
        where there are folders inside.
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
