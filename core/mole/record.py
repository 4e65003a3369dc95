"""Record: what the gates did while a model ran, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError
from .gates import entropy
from .guidance import Rows


@dataclass(eq=False)
class Record:
    """Gate values by pass of the model and scope. A `core.mole.gating.GateObserver`.

    Args:
        rows: Which samples of a batch to keep; default all. A host tells the prompt's from the negative prompt's.

    Attributes:
        passes: One table per pass of the model: scope -> ``(B, N)``.
    """

    rows: Rows | None = None
    passes: list[dict[str, Tensor]] = field(default_factory=list)
    _arguments: Mapping[str, Any] = field(default_factory=dict)

    def start(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments if self.rows is not None else {}
        self.passes.append({})

    def seen(self, scope: str, value: Tensor) -> None:
        value = value.detach()
        if self.rows is not None and value.shape[0] > 1:
            value = value[list(self.rows(self._arguments, value.shape[0]))]
        if value.shape[0] and self.passes:
            self.passes[-1].setdefault(scope, value)  # stays on the device: copying now would make it wait

    @property
    def scopes(self) -> list[str]:
        """Scopes seen, in the order the model reaches them."""
        return list(dict.fromkeys(scope for one in self.passes for scope in one))

    def latest(self) -> tuple[list[str], Tensor]:
        """Scopes and ``(scopes, N)`` float32 gates of the last pass, mean over samples; empty before the first."""
        values = next((one for one in reversed(self.passes) if one), {})
        if not values:
            return [], torch.zeros(0, 0)
        return list(values), torch.stack([value.float().mean(0) for value in values.values()]).cpu()

    def table(self) -> Tensor:
        """``(passes, scopes, N)`` float32 on the CPU, mean over samples; passes that kept no sample are left out.

        Raises:
            MergeError: Nothing was recorded.
        """
        scopes = self.scopes
        full = [one for one in self.passes if all(scope in one for scope in scopes)]
        if not scopes or not full:
            raise MergeError(
                "No gate values were recorded.",
                expected="a run of the model with the mixture on it",
                remedy="sample first; a compiled model records nothing",
            )
        return torch.stack([torch.stack([one[scope].float().mean(0) for scope in scopes]) for one in full]).cpu()

    def mean(self) -> dict[str, Tensor]:
        """Scope -> mean gate values ``(N,)`` over all passes and samples."""
        return dict(zip(self.scopes, self.table().mean(0), strict=True))

    def spread(self) -> dict[str, Tensor]:
        """Scope -> standard deviation ``(N,)`` over passes."""
        return dict(zip(self.scopes, self.table().std(0, unbiased=False), strict=True))

    def entropy(self) -> float:
        """Mean entropy of the gates in nats, see `core.mole.gates.entropy`."""
        return float(entropy([self.table().flatten(0, 1)]))
