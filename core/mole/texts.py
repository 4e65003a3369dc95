"""Texts: which positions of a batch of texts gates read, and the gates that were decided at the prompt.

The gate of a text reads the mean over the text's own positions, without padding. Tokens that a language model generates
use the gates of their prompt, so that no gate depends on later tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import Tensor

from ..errors import MergeError


@dataclass(frozen=True, eq=False)
class TextPositions:
    """The positions that gates read in one forward pass.

    Args:
        mask: ``(B, T)`` bool, the positions of each text that count; positions after the first `T` do not. ``None``:
            all positions count.
        prompt_gates: Scope -> gate values ``(B, N)`` of an earlier pass over the prompt, which are used again.
    """

    mask: Tensor | None = None
    prompt_gates: Mapping[str, Tensor] | None = None

    def only(self, prompt: Tensor) -> TextPositions:
        """The positions that also are in `prompt`, ``(B, T)`` bool."""
        if self.mask is None:
            return replace(self, mask=prompt)
        T = min(self.mask.shape[1], prompt.shape[1])
        return replace(self, mask=self.mask[:, :T] & prompt[:, :T].to(self.mask.device))

    def mean(self, x: Tensor) -> Tensor:
        """``(B, F)``: the mean of ``(B, T, F)`` over each text's own positions. ``(B, F)`` is returned as it is.

        Raises:
            MergeError: `x` is not a batch of texts.
        """
        if self.mask is None:
            return x.flatten(1, -2).mean(1) if x.ndim > 2 else x
        if x.ndim == 2 and len(x) == len(self.mask):
            return x
        mask = self._mask_for(x).to(x)
        share = mask / mask.sum(1, keepdim=True).clamp_min(1)
        return (share[:, None] @ x[:, : mask.shape[1]])[:, 0]

    def by_position(self, x: Tensor) -> Tensor:
        """``(B, T, F)`` of the input of a layer that sees all tokens in one row, ``(B T, F)``."""
        if x.ndim > 2:
            return x
        return x[None] if self.mask is None or len(x) != self.mask.numel() else x.unflatten(0, self.mask.shape)

    def rows(self, x: Tensor) -> Tensor:
        """``(n, F)``: the texts' own positions of ``(B, T, F)``, one after the other."""
        if self.mask is None:
            return x.flatten(0, -2)
        mask = self._mask_for(x)
        return x[:, : mask.shape[1]][mask]

    def _mask_for(self, x: Tensor) -> Tensor:
        assert self.mask is not None
        if x.ndim != 3 or len(x) != len(self.mask) or x.shape[1] < self.mask.shape[1]:
            raise MergeError(
                "A gate reads a layer whose input is not a batch of texts, position by position.",
                expected=f"a batch of texts {tuple(self.mask.shape)} and features",
                found=tuple(x.shape),
                remedy="leave this layer out of the LoRAs, or choose granularity network, whose gate reads the first "
                "layer",
            )
        return self.mask.to(x.device)


class TextReader(Protocol):
    """Interprets the arguments and outputs of a language model. Implemented by hosts."""

    def begin_pass(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> TextPositions:
        """Return the positions that gates read in the pass that begins with these arguments."""
        ...

    def end_pass(self, output: Any, values: Mapping[str, Tensor]) -> None:
        """Called when the pass has ended, with its gate values by scope."""
        ...
