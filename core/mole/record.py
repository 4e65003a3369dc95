"""Record: gate values of a model run, as data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import MergeError
from .gates import entropy
from .guidance import PromptRows


@dataclass(eq=False)
class Record:
    """Gate values by forward pass and scope. A `core.mole.observers.GateObserver`.

    Args:
        rows: Finds the rows of a batch to keep; default all. Hosts keep the prompt's and drop the negative prompt's.

    Attributes:
        passes: One table per forward pass of the model: scope -> ``(B, N)``.
        maps: Per expert, the map of its region in the last pass, ``(K, H, W)``, or ``None`` if it has none; empty
            without regions.
    """

    rows: PromptRows | None = None
    passes: list[dict[str, Tensor]] = field(default_factory=list)
    maps: tuple[Tensor | None, ...] = ()
    _arguments: Mapping[str, Any] = field(default_factory=dict)

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        self._arguments = arguments if self.rows is not None else {}
        self.passes.append({})

    def gate_opened(self, scope: str, value: Tensor) -> None:
        value = value.detach()
        if self.rows is not None and value.shape[0] > 1:
            value = value[list(self.rows(self._arguments, value.shape[0]))]
        if value.shape[0] and self.passes:
            self.passes[-1].setdefault(scope, value)  # stays on its device: copying it now would block a GPU

    def regions_laid(self, maps: Sequence[Tensor | None]) -> None:
        self.maps = tuple(maps)

    @property
    def scopes(self) -> list[str]:
        """Recorded scopes, in the order in which the model reaches them."""
        return list(dict.fromkeys(scope for table in self.passes for scope in table))

    def latest(self) -> tuple[list[str], Tensor]:
        """Scopes and gates ``(scopes, N)`` float32 of the last pass, mean over samples; empty before the first pass."""
        values = next((table for table in reversed(self.passes) if table), {})
        if not values:
            return [], torch.zeros(0, 0)
        return list(values), torch.stack([value.float().mean(0) for value in values.values()]).cpu()

    def table(self) -> Tensor:
        """``(passes, scopes, N)`` float32 on the CPU, mean over samples; without passes of which no sample was kept.

        Raises:
            MergeError: Nothing was recorded.
        """
        scopes = self.scopes
        complete = [table for table in self.passes if all(scope in table for scope in scopes)]
        if not scopes or not complete:
            raise MergeError(
                "No gate values were recorded.",
                expected="a run of the model with the mixture on it",
                remedy="sample first; a compiled model records nothing",
            )
        rows = [torch.stack([table[scope].float().mean(0) for scope in scopes]) for table in complete]
        return torch.stack(rows).cpu()

    def mean(self) -> dict[str, Tensor]:
        """Scope -> mean gate values ``(N,)`` over all passes and samples."""
        return dict(zip(self.scopes, self.table().mean(0), strict=True))

    def spread(self) -> dict[str, Tensor]:
        """Scope -> standard deviation ``(N,)`` over passes."""
        return dict(zip(self.scopes, self.table().std(0, unbiased=False), strict=True))

    def entropy(self) -> float:
        """Mean entropy of the gates in nats, see `core.mole.gates.entropy`."""
        return float(entropy([self.table().flatten(0, 1)]))
