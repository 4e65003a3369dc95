"""The weights of the regions benchmark, on top of the nano model's."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

from legomole.nano.oracle import Oracle
from legomole.nano.store import FOLDER as NANO
from legomole.nano.store import Store, loaded
from torch import Tensor

from . import judge

FOLDER = Path(__file__).parent / "weights"


class RegionStore(Store):
    """A folder with the files ``base`` (the fine-tuned weights only), ``oracle`` and ``loras/<subject>-<seed>``.

    All other weights are the nano model's.
    """

    def __init__(self, folder: Path = FOLDER) -> None:
        super().__init__(folder)

    def _weights(self, name: str) -> dict[str, Tensor]:
        nano = Store(NANO)._weights(name) if name in ("base", "vae") else {}
        return nano if name == "vae" else {**nano, **super()._weights(name)}

    @cached_property
    def oracle(self) -> Oracle:
        """The judge of half pictures."""
        return loaded(judge.build(), self._weights("oracle"))
