"""Hashes that identify files."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Lock
from typing import Any

from ..errors import SaveError
from ..json_text import from_json
from .file_changes import changed_while_read
from .files import check_file, write_bytes

_KEPT_HASHES = 4096
_SETTLED = 2 * 10**9  # nanoseconds after which a write gives a file another time, on any file system


def sha256(*paths: Path) -> str:
    """The SHA-256 of a file's bytes; for several files, of their bytes one after the other."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def hash_in_background(files: Sequence[Sequence[Path]]) -> Generator[list[Future[str]]]:
    """The SHA-256 of LoRAs of one or several files each, computed in a thread while the block runs."""
    pool = ThreadPoolExecutor(1)
    try:
        yield [pool.submit(sha256, *paths) for paths in files]
    finally:
        pool.shutdown(cancel_futures=True)


class KeptHashes:
    """The SHA-256 of files, kept between runs. Thread-safe.

    A hash serves a path as long as size, times of modification and of change, and inode are those of the hashed file.

    Args:
        path: File to keep the hashes in, as JSON; ``None`` keeps them in memory only.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self._entries = {} if path is None else _stored_hashes(path)
        self._lock = Lock()

    def find(self, file: Path) -> str | None:
        """The hash of a file, if it is known; the file is not read."""
        with self._lock:
            entry = self._entries.get(str(file.absolute()))
        return None if entry is None or entry[:-1] != _state(file) else entry[-1]

    def sha256(self, file: Path) -> str:
        """The hash of a file. It is kept unless the file was written in the last two seconds.

        Raises:
            FormatError: The file changed while it was read.
        """
        known = self.find(file)
        if known is not None:
            return known
        before, now = _state(file), time.time_ns()
        digest = sha256(file)
        if _state(file) != before:
            raise changed_while_read(file)
        if max(before[1:3]) < now - _SETTLED:
            self._keep(file, [*before, digest])
        return digest

    def _keep(self, file: Path, entry: list[Any]) -> None:
        with self._lock:
            if self.path is not None:  # another process may have added some
                self._entries = _stored_hashes(self.path) | self._entries
            self._entries.pop(str(file.absolute()), None)
            self._entries[str(file.absolute())] = entry
            for oldest in list(self._entries)[:-_KEPT_HASHES]:
                del self._entries[oldest]
            if self.path is not None:
                with suppress(OSError, SaveError):  # without the file they are computed again in the next run
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                    write_bytes(self.path, json.dumps(self._entries).encode())


def _state(file: Path) -> list[int]:
    status = file.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _stored_hashes(path: Path) -> dict[str, list[Any]]:
    """The hashes in a file; none where it is missing or damaged."""
    try:
        entries: Any = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return entries if isinstance(entries, dict) and all(map(_is_entry, entries.values())) else {}


def _is_entry(entry: Any) -> bool:
    kinds = (int, int, int, int, str)
    return isinstance(entry, list) and [*map(type, entry)] == [*kinds] and len(entry[-1]) == 64


def fingerprint(*paths: Path, text: str = "") -> str:
    """The SHA-256 of the sizes of files, of the first and last MiB of each, and of a text.

    Raises:
        FormatError: A file cannot be read.
    """
    digest = hashlib.sha256(text.encode())
    for path in paths:
        check_file(path)
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()
