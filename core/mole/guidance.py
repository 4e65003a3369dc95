"""Classifier-free guidance: the samples of a negative prompt get the gates of the prompt.

Guidance extrapolates from the negative prompt's prediction to the prompt's and beyond. A LoRA that acts on only one of
the two would be amplified; with the same gates in both, a mixture acts as strongly as a merged LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The rows of a batch that belong to the prompt, from keyword arguments of the model's forward and the batch size.
PromptRows = Callable[[Mapping[str, Any], int], Sequence[int]]


class PromptPassRequired(Exception):
    """A negative prompt was passed before the prompt whose gates it needs: run the prompt first, then try again."""


class PromptGateSharing:
    """Gives the samples of a negative prompt the gates of the prompt.

    Args:
        rows: Finds the prompt's rows of a batch; the others are the negative prompt's, in the same order. If a prompt
            has several parts, the negative prompt gets the mean of their gates.
        separate_passes: Whether the two may come in separate passes. The prompt's gates are then remembered until
            `begin_step`.

    Attributes:
        enabled: If false, every sample keeps its own gates.
        require_prompt_first: Raise `PromptPassRequired` if a negative prompt comes first; if false it keeps its own
            gates.
    """

    def __init__(self, rows: PromptRows, *, separate_passes: bool = False) -> None:
        self.rows, self.separate_passes = rows, separate_passes
        self.enabled, self.require_prompt_first = True, False
        self._batch = 0
        self._prompt_rows: tuple[int, ...] = ()
        self._prompt_gates: dict[str, list[Tensor]] = {}  # scope -> gates of the prompt's samples, pass by pass
        self._prompt_passed = False
        self._indices: dict[Any, Tensor] = {}

    def begin_step(self) -> None:
        """Forget the prompt's gates: the next sampling step begins."""
        self._prompt_gates.clear()
        self._prompt_passed = False

    def begin_pass(self, arguments: Mapping[str, Any], batch: int) -> None:
        """Prepare a forward pass of `batch` samples with these keyword arguments.

        Raises:
            PromptPassRequired: See `require_prompt_first`.
        """
        self._batch, self._prompt_rows = batch, tuple(self.rows(arguments, batch))
        if self._remembers and self._prompt_rows:
            self._prompt_passed = True
        elif self._remembers and self.require_prompt_first and not self._prompt_passed:
            raise PromptPassRequired

    def __call__(self, scope: str, value: Tensor) -> Tensor:
        """Gates ``(B, N)`` of a scope, with the prompt's for negative prompts; ``(1, N)`` is returned as it is."""
        if not self.enabled or value.shape[0] != self._batch:
            return value
        source = value
        if self._remembers:
            if self._prompt_rows:
                rows = self._index((self._prompt_rows,), value.device)[0]
                self._prompt_gates.setdefault(scope, []).append(value[rows])
            elif scope in self._prompt_gates:
                source = torch.cat(self._prompt_gates[scope])
        if len(self._prompt_rows) == self._batch or (not self._prompt_rows and source is value):
            return value
        index = self._index(_source_rows(self._prompt_rows, self._batch, len(source)), value.device)
        return source[index].mean(0)

    @property
    def _remembers(self) -> bool:
        # a compiled model keeps nothing from one pass to the next
        return self.enabled and self.separate_passes and not torch.compiler.is_compiling()

    def _index(self, rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(rows, device=device)
        key = (rows, device)
        if key not in self._indices:  # cached: a copy to a GPU in every pass would block
            self._indices[key] = torch.tensor(rows, device=device)
        return self._indices[key]


def _source_rows(prompt_rows: tuple[int, ...], batch: int, remembered: int) -> tuple[tuple[int, ...], ...]:
    """For each part of the prompt, the row whose gates each sample gets: ``parts x batch`` positions.

    Args:
        prompt_rows: Rows of the prompt in this pass; if there are none, all `remembered` rows of earlier passes are.
    """
    sources = prompt_rows or tuple(range(remembered))
    negative = [row for row in range(batch) if row not in prompt_rows]
    size = math.gcd(len(sources), len(negative))  # samples of one part
    rank = {row: i for i, row in enumerate(negative)}
    return tuple(
        tuple(sources[part + rank[row] % size] if row in rank else row for row in range(batch))
        for part in range(0, len(sources), size)
    )
