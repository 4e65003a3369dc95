"""Inputs that must not change while they are read."""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

from ..errors import FormatError
from .peft_folder import CONFIG, folder_of


@contextmanager
def unchanged(inputs: Iterable[Path]) -> Generator[None]:
    """Refuse what was made of LoRAs inside the block if their files were replaced or written to meanwhile.

    Tensors are views of mapped files: one that another program writes to in place would be read half old, half new, and
    a folder's configuration beside the weights of another. (Programs that replace a file as a whole, as this one does,
    leave the old one to its readers.)

    Args:
        inputs: Files and PEFT folders.

    Raises:
        FormatError: Size, time of change or identity of a file are no longer the same.
    """
    inputs = list(inputs)
    before = states(inputs)
    yield
    changed = [path for path, state in states(inputs).items() if before.get(path) != state]
    if changed:
        raise FormatError(
            "The file was changed while it was read.", file=changed[0], remedy="try again when nothing writes to it"
        )


def states(inputs: Iterable[Path]) -> dict[Path, tuple[int, ...] | None]:
    """Size, time of change and identity of files, and of those in folders; ``None`` for what is not there."""
    found: dict[Path, tuple[int, ...] | None] = {}
    for path in inputs:
        try:
            folder = folder_of(path)
            files = [path] if folder is None else [folder / CONFIG, *sorted(folder.glob("*.safetensors"))]
            found |= {file: (s.st_size, s.st_mtime_ns, s.st_ino) for file in files for s in (file.stat(),)}
        except (OSError, ValueError):  # whoever reads it will say what is wrong
            found[path] = None
    return found
