"""The interface of a format: detect, read and write LoRA files of one dialect."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from torch import Tensor

from ..adapter import Adapter, Source
from .base_weights import BaseWeights


class Format(Protocol):
    """One way to name and store the tensors of a LoRA."""

    @property
    def name(self) -> str:
        """The key in ``FORMATS``."""
        ...

    def matches(self, keys: Collection[str]) -> bool:
        """Whether a file with these keys is of this format. The first match in ``FORMATS`` counts."""
        ...

    def is_native_name(self, module: str) -> bool:
        """Whether a module name belongs to the format's own dialect."""
        ...

    def can_store_name(self, module: str) -> bool:
        """Whether the format can store a module name: a native one, or one that occurs in files of the format."""
        ...

    def read(
        self,
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
        source: Source,
        convert_rank: int | None,
        base: BaseWeights | None = None,
    ) -> Adapter:
        """The adapter in a file's tensors; `base` turns DoRA into updates. Raises: FormatError."""
        ...

    def write(self, adapter: Adapter) -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors and metadata of the file. Raises: SaveError."""
        ...
