"""Mixture: several LoRAs kept apart, with the gates that decide how much of each goes in."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Literal

from ..adapter import Adapter
from ..errors import MergeError
from ..layers.keymap import ParameterSlice
from .gates import GateSet

MixMode = Literal["delta", "output"]


@dataclass(frozen=True, eq=False)
class Mixture:
    """LoRAs as experts. Immutable; `attach` puts it on a model, `freeze` makes one LoRA of it.

    ``delta`` mixing: every adapted layer gives ``W x + sum_i g_i strength_i scale_i B_i A_i x``. ``output`` mixing:
    every block gives ``F(x) + sum_i g_i (F_i(x) - F(x))`` with ``F_i`` the block under LoRA `i` alone, one more pass of
    the block per expert; layers outside of blocks, or around other blocks, are mixed by their deltas.

    Args:
        experts: The LoRAs, with common module names (see `core.layers.align`).
        gates: Default untrained ones, which mix evenly.
        strengths: Per expert, default 1; negative subtracts, 0 silences.
        scale: Multiplies all of them.
        mixing: ``delta`` or ``output``.
        places: Module name -> where it sits in the model, for names that are not paths of the model.

    Raises:
        MergeError: No experts, gates for another number of them, strengths or a scale that are not finite numbers, or
            output mixing with gates that are not per block.

    Source: arXiv:2404.13628 eq. 5 to 8, read as in the glossary: an expert is what a LoRA adds.
    """

    experts: tuple[Adapter, ...]
    gates: GateSet = None  # type: ignore[assignment]
    strengths: tuple[float, ...] = ()
    scale: float = 1.0
    mixing: MixMode = "delta"
    places: Mapping[str, ParameterSlice] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "experts", tuple(self.experts))
        n = len(self.experts)
        if n == 0:
            raise MergeError("There is nothing to mix.", expected="at least one LoRA", found="none")
        object.__setattr__(self, "gates", self.gates or GateSet(n))
        object.__setattr__(self, "strengths", tuple(float(s) for s in self.strengths) or (1.0,) * n)
        object.__setattr__(self, "places", MappingProxyType(dict(self.places)))
        if len(self.strengths) != n:
            raise MergeError("Every LoRA needs one strength.", expected=n, found=len(self.strengths))
        if not all(map(math.isfinite, (*self.strengths, self.scale))):
            raise MergeError(
                "A strength is not a finite number.", expected="e.g. 0.8", found=[*self.strengths, self.scale]
            )
        if self.gates.experts != n:
            raise MergeError(
                "The gates were made for another number of LoRAs.",
                expected=f"{self.gates.experts} LoRAs",
                found=", ".join(adapter.label for adapter in self.experts),
                remedy="connect the LoRAs the gates were trained with, in any order",
            )
        if self.mixing == "output" and self.gates.settings.granularity != "block":
            raise MergeError(
                "Output mixing mixes whole blocks.",
                expected="gates of granularity block",
                found=f"granularity {self.gates.settings.granularity}",
                remedy="train gates of granularity block, or use delta mixing",
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """What to call the experts."""
        return tuple(adapter.label for adapter in self.experts)

    def only(self, keep: Sequence[int]) -> Mixture:
        """The mixture with the other experts switched off: as if it had been built without them, nothing is retrained.

        Softmax shares of the rest are renormalised in proportion; one left alone under softmax acts as that LoRA does.
        Sigmoid gates do not depend on each other and stay.

        Args:
            keep: Positions, at least one, each once.

        Raises:
            MergeError: None left, or a position that is not there.

        Source: arXiv:2404.13628, section 3.3.
        """
        keep = sorted(set(keep))
        if not keep:
            raise MergeError("Every LoRA is switched off.", expected="at least one that is on", found="none")
        if keep[0] < 0 or keep[-1] >= len(self.experts):
            raise MergeError("There is no such LoRA to keep.", expected=f"0 .. {len(self.experts) - 1}", found=keep)
        if len(keep) == len(self.experts):
            return self
        return replace(
            self,
            experts=tuple(self.experts[i] for i in keep),
            gates=self.gates.select(keep),
            strengths=tuple(self.strengths[i] for i in keep),
        )

    def without(self, *off: int) -> Mixture:
        """The mixture with these experts switched off, see `only`."""
        return self.only([i for i in range(len(self.experts)) if i not in off])
