"""Hashes of files, to know them again."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from .files import inspect


def sha256(*paths: Path) -> str:
    """The hash of a file's bytes; of several, of all their bytes in this order."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


@contextmanager
def hash_in_background(files: Sequence[Sequence[Path]]) -> Generator[list[Future[str]]]:
    """The hashes of LoRAs, each of one or several files, made in a thread of their own beside the block."""
    pool = ThreadPoolExecutor(1)
    try:
        yield [pool.submit(sha256, *paths) for paths in files]
    finally:
        pool.shutdown(cancel_futures=True)


def fingerprint(*paths: Path, text: str = "") -> str:
    """The hash of the sizes of files, of the first and last megabyte of each, and of a text.

    Raises:
        FormatError: A file that cannot be read.
    """
    digest = hashlib.sha256(text.encode())
    for path in paths:
        inspect(path)
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            digest.update(str(size).encode())
            for start in (0, max(0, size - (1 << 20))):
                file.seek(start)
                digest.update(file.read(1 << 20))
    return digest.hexdigest()
