"""The inputs of a merge, to be opened again on other machines."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..adapter import Adapter
from ..errors import FormatError
from ..formats import fingerprint, load
from ..layers.align import KeyMapResolver, align
from ..merge.tasks import BatchMerger, BatchResult, ModuleBatch


@dataclass(frozen=True)
class RemoteInputs:
    """The inputs of a merge, to be opened on a machine that sees the same files.

    Args:
        paths: Absolute paths.
        names: Paths as written in the recipe, for errors.
        fingerprints: `fingerprint` of each input.
        convert_ranks: See `load`.
        key_map: See `run`; called on the other machine.
    """

    paths: tuple[Path, ...]
    names: tuple[str, ...]
    fingerprints: tuple[str, ...]
    convert_ranks: tuple[int | None, ...]
    key_map: KeyMapResolver | None

    @classmethod
    def of(
        cls,
        adapters: Sequence[Adapter],
        paths: Sequence[Path],
        convert_ranks: Sequence[int | None],
        key_map: KeyMapResolver | None,
    ) -> RemoteInputs:
        """Describe inputs that are loaded on this machine."""
        names = tuple(adapter.source.path for adapter in adapters)
        return cls(tuple(paths), names, tuple(map(fingerprint, paths)), tuple(convert_ranks), key_map)

    def open(self) -> list[Adapter]:
        """Load and align the adapters as the merge has them.

        Raises:
            FormatError: A file is missing or differs.
        """
        adapters: list[Adapter] = []
        for path, name, expected, convert_rank in zip(
            self.paths, self.names, self.fingerprints, self.convert_ranks, strict=True
        ):
            try:
                if fingerprint(path) != expected:
                    raise FormatError("The file differs.")
                adapter = load(path, convert_rank=convert_rank, verify=False)
            except FormatError as error:
                raise FormatError(
                    "A machine of the cluster does not have an input of the merge.",
                    file=path,
                    found=f"{error.problem} ({platform.node()})",
                    remedy="keep the inputs on a file system that all machines share, under the same path on each",
                ) from error
            adapters.append(adapter.sourced(path=name))
        return align(adapters, key_map=self.key_map)


RemoteRunner = Callable[[RemoteInputs, BatchMerger, Sequence[ModuleBatch]], Iterable[BatchResult]]
"""Merges batches on other machines, where the inputs are opened again; yields the results in order."""
