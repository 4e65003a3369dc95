"""Observers: callbacks for gate values, and for the features that gates read, during a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from torch import Tensor

# Called with the name of a scope, the features (B, F) that its gate reads, and the expert (F,) each feature belongs to.
InputObserver = Callable[[str, Tensor, "Tensor | None"], None]


class GateObserver(Protocol):
    """Observes gate values. Not called from inside a compiled model."""

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        """Called when a forward pass of the whole model begins, with its keyword arguments."""
        ...

    def gate_opened(self, scope: str, value: Tensor) -> None:
        """Called with the value ``(B, N)`` or ``(1, N)`` of a gate, float32, with its graph if gradients are enabled.

        For gates per token the value is the mean over each text's own positions.
        """
        ...

    def regions_laid(self, maps: Sequence[Tensor | None]) -> None:
        """Called after `begin_pass` in a mixture with regions, with the map of each expert in this pass.

        Args:
            maps: Per expert ``(K, H, W)``, see `core.mole.regions.maps`, or ``None``: it acts everywhere.
        """
        ...


class CollectedGates:
    """A `GateObserver` that keeps the latest value of each gate, by scope."""

    def __init__(self) -> None:
        self.values: dict[str, Tensor] = {}

    def begin_pass(self, arguments: Mapping[str, Any]) -> None:
        pass

    def gate_opened(self, scope: str, value: Tensor) -> None:
        self.values[scope] = value

    def regions_laid(self, maps: Sequence[Tensor | None]) -> None:
        pass
