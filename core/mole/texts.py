"""TextPositions: which positions of a batch of texts the gates read, and what they decided at the prompt.

The gate of a text reads the mean over its own positions, without the padding. Tokens that a language model generates
take the gates of their prompt: what was decided before they came, so that no gate looks ahead.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ..errors import MergeError


@dataclass(frozen=True, eq=False)
class TextPositions:
    """What the gates go by in one pass of the model.

    Args:
        own: ``(B, T)`` bool, the positions of each text that count; after the first `T` none does. ``None``: all do.
        kept: Scope -> gates ``(B, N)`` opened in an earlier pass, which stay.
    """

    own: Tensor | None = None
    kept: Mapping[str, Tensor] | None = None

    def only(self, prompt: Tensor) -> TextPositions:
        """Of the positions that count, those among `prompt`, ``(B, T)`` bool."""
        if self.own is None:
            return replace(self, own=prompt)
        T = min(self.own.shape[1], prompt.shape[1])
        return replace(self, own=self.own[:, :T] & prompt[:, :T].to(self.own.device))

    def mean(self, x: Tensor) -> Tensor:
        """``(B, F)``: the mean of ``(B, T, F)`` over a text's own positions. What has no positions stays as it is.

        Raises:
            MergeError: `x` does not show the texts position by position.
        """
        if self.own is None:
            return x.flatten(1, -2).mean(1) if x.ndim > 2 else x
        if x.ndim == 2 and len(x) == len(self.own):
            return x
        own = self._fit(x).to(x)
        share = own / own.sum(1, keepdim=True).clamp_min(1)
        return (share[:, None] @ x[:, : own.shape[1]])[:, 0]

    def positions(self, x: Tensor) -> Tensor:
        """``(B, T, F)`` of a layer that sees the tokens in a row, ``(B T, F)``."""
        if x.ndim > 2:
            return x
        return x[None] if self.own is None or len(x) != self.own.numel() else x.unflatten(0, self.own.shape)

    def rows(self, x: Tensor) -> Tensor:
        """``(n, F)``: the own positions of ``(B, T, F)``, one after the other."""
        if self.own is None:
            return x.flatten(0, -2)
        own = self._fit(x)
        return x[:, : own.shape[1]][own]

    def _fit(self, x: Tensor) -> Tensor:
        assert self.own is not None
        if x.ndim != 3 or len(x) != len(self.own) or x.shape[1] < self.own.shape[1]:
            raise MergeError(
                "A gate reads a layer that does not see the texts position by position.",
                expected=f"a batch of texts {tuple(self.own.shape)} and features",
                found=tuple(x.shape),
                remedy="leave this layer out of the LoRAs, or choose granularity network, whose gate reads the first "
                "layer",
            )
        return self.own.to(x.device)


class TextReader(Protocol):
    """Knows what a language model's arguments mean. A host's."""

    def begin(self, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> TextPositions:
        """A pass of the model begins, called with these: what do gates go by?"""
        ...

    def end(self, output: Any, values: Mapping[str, Tensor]) -> None:
        """It ended, with these gates: scope -> value."""
        ...
