"""Mixture: several LoRAs as experts, with the gates that decide how much of each is added at run time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from ..adapter import Adapter
from ..errors import MergeError
from ..layers.keymap import ParameterSlice
from .gates import GateSet
from .regions.maps import checked_maps

MixMode = Literal["delta", "output"]
Regions = tuple[Tensor | None, ...] | Literal["automatic"]


@dataclass(frozen=True, eq=False)
class _MixtureFields:
    experts: tuple[Adapter, ...]
    gates: GateSet
    strengths: tuple[float, ...]
    scale: float
    mixing: MixMode
    targets: Mapping[str, ParameterSlice]
    regions: Regions
    steps: tuple[tuple[float, float], ...]


class Mixture(_MixtureFields):
    """LoRAs as experts. Immutable; `attach` puts it on a model, `freeze` merges it to one LoRA.

    ``delta`` mixing: every adapted layer computes ``W x + sum_i g_i strength_i scale_i B_i A_i x``. ``output`` mixing:
    every block computes ``F(x) + sum_i g_i (F_i(x) - F(x))`` with ``F_i`` the block with LoRA `i` alone, one more pass
    of the block per expert; layers outside of blocks, or around other blocks, are mixed by their deltas.

    Args:
        experts: The LoRAs, with common module names (see `core.layers.align`).
        gates: Default untrained gates, which mix evenly.
        strengths: Per expert, default 1; a negative strength subtracts, 0 adds nothing.
        scale: Multiplies all strengths.
        mixing: ``delta`` or ``output``.
        targets: Module name -> rows of a parameter in the model, for names that are not paths of the model.
        regions: Per expert, ``None`` (everywhere) or a map ``(H, W)`` of 0 .. 1 that multiplies its gates at every
            position of the picture, of any size; ``(K, H, W)`` for the pictures of a batch or a video's frames. Or
            ``"automatic"``: the model's attention to each LoRA's words decides. See `core.mole.regions`.
        steps: Per expert, the part of the sampling run in which it acts: start and end, 0 .. 1.

    Raises:
        MergeError: No experts, gates for another number of experts, strengths or a scale that are not finite, regions
            or steps that are not for these experts, or output mixing with regions or with gates that are not per block.

    Source: arXiv:2404.13628 eq. 5 to 8, with ``E_i(x) = F_i(x) - F(x)``: an expert's output is what its LoRA adds.
    """

    def __init__(
        self,
        experts: Sequence[Adapter],
        gates: GateSet | None = None,
        strengths: Sequence[float] = (),
        scale: float = 1.0,
        mixing: MixMode = "delta",
        targets: Mapping[str, ParameterSlice] | None = None,
        regions: Sequence[Any] | Literal["automatic"] = (),
        steps: Sequence[tuple[float, float]] = (),
    ) -> None:
        n = len(experts)
        if n == 0:
            raise MergeError("There is nothing to mix.", expected="at least one LoRA", found="none")
        super().__init__(
            tuple(experts),
            GateSet(n) if gates is None else gates,
            tuple(float(strength) for strength in strengths) or (1.0,) * n,
            scale,
            mixing,
            MappingProxyType(dict(targets or {})),
            _regions(regions, [adapter.label for adapter in experts]),
            tuple((float(start), float(end)) for start, end in steps) or ((0.0, 1.0),) * n,
        )
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
        if len(self.steps) != n or not all(0 <= start <= end <= 1 for start, end in self.steps):
            raise MergeError(
                "Every LoRA needs a part of the sampling steps.",
                expected=f"{n} pairs of start and end, 0 <= start <= end <= 1",
                found=list(self.steps),
            )
        if self.mixing == "output" and self.is_partial:
            raise MergeError(
                "Output mixing mixes whole blocks in all steps, without regions.", remedy="use delta mixing"
            )

    @property
    def is_partial(self) -> bool:
        """Whether an expert acts in a region, or in a part of the sampling steps."""
        has_regions = self.regions == "automatic" or any(map_ is not None for map_ in self.regions)
        return has_regions or any(part != (0.0, 1.0) for part in self.steps)

    @property
    def labels(self) -> tuple[str, ...]:
        """Names of the experts for users."""
        return tuple(adapter.label for adapter in self.experts)

    def only(self, keep: Sequence[int]) -> Mixture:
        """The mixture with only these experts switched on, as if built without the others; nothing is retrained.

        Softmax shares of the remaining experts are renormalised in proportion; a single remaining expert acts as its
        LoRA does. Sigmoid gates do not depend on each other and stay the same.

        Args:
            keep: Indices of experts, at least one, each once.

        Raises:
            MergeError: No expert remains, or an index is out of range.

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
            regions="automatic" if self.regions == "automatic" else tuple(self.regions[i] for i in keep),
            steps=tuple(self.steps[i] for i in keep),
        )

    def without(self, *off: int) -> Mixture:
        """The mixture with these experts switched off, see `only`."""
        return self.only([i for i in range(len(self.experts)) if i not in off])


def _regions(regions: Sequence[Any] | Literal["automatic"], labels: Sequence[str]) -> Regions:
    return "automatic" if isinstance(regions, str) and regions == "automatic" else checked_maps(regions, labels)
