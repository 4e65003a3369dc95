"""What a format is: how to tell it, read it and write it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from ..adapter import Adapter, Source


class Format(Protocol):
    """A way of naming and storing the tensors of a LoRA."""

    @property
    def name(self) -> str:
        """Its name in ``FORMATS``."""
        ...

    def matches(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys is of this format. The first match in ``FORMATS`` counts."""
        ...

    def fits(self, module: str) -> bool:
        """Whether a module name is one of the format's own."""
        ...

    def carries(self, module: str) -> bool:
        """Whether the format can say a module name, its own or one that its files have been seen with."""
        ...

    def read(
        self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], source: Source, convert_rank: int | None
    ) -> Adapter:
        """Raises: FormatError."""
        ...

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of the file. Raises: SaveError."""
        ...
