"""The SHA-256 of LoRA files, which recipes name: kept between runs, and computed while something else is done."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from ..core.formats.file_changes import changed_while_read, file_states
from ..core.formats.hashes import KeptHashes

FileState = dict[Path, tuple[int, ...] | None]

_thread = ThreadPoolExecutor(1, "LegoMoLE hashes")
_kept = KeptHashes()


def keep_in(path: Path) -> None:
    """Keep the hashes in a file, from now on."""
    global _kept
    _kept = KeptHashes(path)


def sha256_of(file: Path) -> str:
    """The hash of a file.

    Raises:
        FormatError: The file changed while it was read.
    """
    return _kept.sha256(file)


def sha256_later(file: Path, loaded: FileState) -> Future[str]:
    """The hash of a file that has been loaded, computed in a thread.

    Args:
        file: The file. loaded: Its state, `file_states`, from before it was loaded; the future raises FormatError if it
            is another one after the hash was computed, so that the hash is that of the loaded file.
    """
    return _thread.submit(_sha256_unless_changed, file, loaded)


def _sha256_unless_changed(file: Path, loaded: FileState) -> str:
    digest = _kept.sha256(file)
    if file_states([file]) != loaded:
        raise changed_while_read(file)
    return digest
