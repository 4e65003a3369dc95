"""The inputs of a merge as other machines find them."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError
from ..formats import fingerprint, load
from ..layers.align import align
from ..layers.keymap import KeyMap
from ..merge.tasks import BatchMerger, BatchResult, ModuleBatch


@dataclass(frozen=True)
class RemoteInputs:
    """The inputs of a merge, to be opened on another machine that sees the same files.

    Args:
        paths: Absolute. names: As the recipe has them, for errors. prints: Their fingerprints.
        convert_rank, key_map: See `run`; the key map is called there.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    prints: tuple[str, ...]
    convert_rank: int | None
    key_map: Callable[[Sequence[Adapter]], KeyMap] | None

    @classmethod
    def of(
        cls,
        adapters: Sequence[Adapter],
        paths: Sequence[Path],
        convert_rank: int | None,
        key_map: Callable[[Sequence[Adapter]], KeyMap] | None,
    ) -> RemoteInputs:
        names = tuple(adapter.source.path for adapter in adapters)
        return cls(tuple(paths), names, tuple(map(fingerprint, paths)), convert_rank, key_map)

    def open(self) -> list[Adapter]:
        """The adapters under common names, as the merge has them.

        Raises:
            FormatError: A file that is not there, or another one.
        """
        adapters: list[Adapter] = []
        for path, name, known in zip(self.paths, self.names, self.prints, strict=True):
            try:
                if fingerprint(path) != known:
                    raise FormatError("It is another file.")
                adapter = load(path, convert_rank=self.convert_rank, known=True)
            except FormatError as error:
                raise FormatError(
                    "A machine that helps with the merge does not have an input that this one has.",
                    file=path,
                    found=f"{error.problem} ({platform.node()})",
                    remedy="keep the inputs on a file system that all machines share, under the same path on each",
                ) from error
            adapters.append(adapter.sourced(path=name))
        return align(adapters, key_map=self.key_map)


RemoteRunner = Callable[[RemoteInputs, BatchMerger, Sequence[ModuleBatch]], Iterable[BatchResult]]
"""Does the work of a merge elsewhere, where the inputs are opened anew."""
