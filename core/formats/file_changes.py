"""Detect input files that change while they are read."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from ..errors import FormatError
from .peft_folder import CONFIG, find_peft_folder


@contextmanager
def raise_if_changed(inputs: Iterable[Path]) -> Generator[None]:
    """Raise if input files change while the block runs.

    Tensors are views of memory-mapped files: of a file that another program writes in place, half of the old and half
    of the new values would be read, and a folder's configuration could meet the weights of another adapter. (Where a
    program replaces the whole file, as this one does, readers keep the old file.)

    Args:
        inputs: Files and PEFT folders.

    Raises:
        FormatError: Size, modification time or inode of a file have changed.
    """
    inputs = list(inputs)
    before = file_states(inputs)
    yield
    changed = [path for path, state in file_states(inputs).items() if before.get(path) != state]
    if changed:
        raise changed_while_read(changed[0])


def changed_while_read(file: Path) -> FormatError:
    """The error for a file that was changed while it was read."""
    return FormatError(
        "The file was changed while it was read.", file=file, remedy="try again when nothing writes to it"
    )


def file_states(inputs: Iterable[Path]) -> dict[Path, tuple[int, ...] | None]:
    """Size, modification time and inode of files, and of the files in PEFT folders; ``None`` for a missing path."""
    states: dict[Path, tuple[int, ...] | None] = {}
    for path in inputs:
        try:
            folder = find_peft_folder(path)
            files = [path] if folder is None else [folder / CONFIG, *sorted(folder.glob("*.safetensors"))]
            states |= {file: (s.st_size, s.st_mtime_ns, s.st_ino) for file in files for s in (file.stat(),)}
        except (OSError, ValueError):  # the code that reads the file reports the error
            states[path] = None
    return states
