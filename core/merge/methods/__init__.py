"""The merge methods: one small file each, one row each in `METHODS`.

A method is a frozen dataclass of its hyperparameters, called with a `Pool` and returning a `Merged`.
"""

from __future__ import annotations

from typing import Protocol

from ..pool import Merged, Pool
from .calibrated import Calibrated
from .concat import Concat
from .dare import Dare
from .knots import Knots
from .lego import Lego
from .linear import Linear
from .svd import SVD
from .ties import Ties


class MergeMethod(Protocol):
    """Turns a batch of like modules into one LoRA update each."""

    def __call__(self, pool: Pool) -> Merged: ...


METHODS: dict[str, type[MergeMethod]] = {
    "lego": Lego,
    "concat": Concat,
    "linear": Linear,
    "svd": SVD,
    "ties": Ties,
    "dare": Dare,
    "knots": Knots,
    "calibrated": Calibrated,
}
