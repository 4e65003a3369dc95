"""Hashes that identify files."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .files import check_file


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
