"""The merge methods: one module each, one row each in `METHODS`.

A method is a frozen dataclass of its hyperparameters. It is called with a `Pool` and returns a `Merged`.
"""

from __future__ import annotations

from typing import Protocol

from ..merged import Merged
from ..pool import Pool
from .calibrated import Calibrated
from .concat import Concat
from .dare import Dare
from .knots import Knots
from .lego import Lego
from .linear import Linear
from .np_lora import NP
from .ssr import SSR
from .svd import SVD
from .ties import Ties


class MergeMethod(Protocol):
    """Merges a batch of like modules into one LoRA update each."""

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
    "ssr": SSR,
    "np": NP,
}
