"""A folder of measured statistics, so that another merge of the same LoRAs measures nothing."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from pathlib import Path

from ..digest import digest
from ..errors import LegoMoleError
from .statistics import Statistics

LIMIT = 2 << 30
"""Bytes of statistics that are kept; the least recently used files are removed first."""
_IN_USE = 60.0  # seconds for which a file counts as in use by another process
_NAME = re.compile(r"[0-9a-f]{32}\.statistics\.safetensors")


def cache_folder() -> Path:
    """The folder: ``legomole/statistics`` in the user's cache folder. It may not exist yet."""
    variable, default = ("LOCALAPPDATA", "AppData/Local") if sys.platform == "win32" else ("XDG_CACHE_HOME", ".cache")
    return Path(os.environ.get(variable) or Path.home() / default) / "legomole" / "statistics"


def cache_key(parts: object) -> str:
    """The key of statistics that depend on these parts, data that JSON can hold."""
    return digest([], json.dumps(parts))[:32]


def cached_path(key: str) -> Path:
    """The path of the statistics with a key, 32 hexadecimal digits."""
    return cache_folder() / f"{key}.statistics.safetensors"


def find_cached_file(name: str) -> Path | None:
    """The cached file of this name, or ``None``."""
    path = cache_folder() / name
    return path if _NAME.fullmatch(name) and path.is_file() else None


def load_cached(key: str) -> Statistics | None:
    """The statistics that were stored with a key; ``None`` if there are none, or if the file is damaged."""
    path = cached_path(key)
    if not path.is_file():
        return None
    try:
        statistics = Statistics.load(path)
        os.utime(path)
    except (LegoMoleError, OSError):
        return None
    return statistics


def store_cached(key: str, statistics: Statistics) -> Path | None:
    """Store statistics, and remove the least recently used files beyond `LIMIT`.

    Returns:
        The path; ``None`` if the statistics are larger than the limit or the folder cannot be written.
    """
    if statistics.size > LIMIT:
        return None
    path = cached_path(key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(path)
        files = [(entry.stat(), entry) for entry in path.parent.iterdir() if _NAME.fullmatch(entry.name)]
        total = sum(stat.st_size for stat, _ in files)
        for stat, entry in sorted(files, key=lambda file: file[0].st_mtime):
            if total <= LIMIT:
                break
            if entry != path and stat.st_mtime < time.time() - _IN_USE:
                entry.unlink(missing_ok=True)
                total -= stat.st_size
    except (LegoMoleError, OSError):
        return None
    return path
