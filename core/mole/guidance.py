"""Classifier-free guidance: the samples of a negative prompt get the gates of the prompt.

Guidance extrapolates from the negative prompt's prediction to the prompt's and beyond. A LoRA that acts on only one of
the two would be amplified by the guidance scale; with the same gates in both, a mixture acts as strongly as a merged
LoRA. The exception is a LoRA whose concept the other prompt names itself: there its own gate counts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# The rows of a batch that belong to the prompt, from keyword arguments of the model's forward and the batch size.
PromptRows = Callable[[Mapping[str, Any], int], Sequence[int]]
# Text conditionings (B, T, F) of the prompt, each with its mask (B, T) or None, from the same keyword arguments.
PromptTexts = Callable[[Mapping[str, Any]], "Sequence[tuple[Tensor, Tensor | None]]"]


class PromptPassRequired(Exception):
    """A negative prompt was passed before the prompt whose gates it needs: run the prompt first, then try again."""


class PromptGateSharing:
    """Gives the samples of negative, empty and further prompts the gates of the prompt.

    Args:
        rows: Finds the prompt's rows of a batch; the others follow it, in the same order. If a prompt has several
            parts, the others get the mean of their gates.
        separate_passes: Whether they may come in separate passes. The prompt's gates are then remembered until the
            prompt passes again in a later step.
        texts: Finds the prompt's text, for passes without the prompt; gates that read text then need no pass of it.

    Attributes:
        require_prompt_first: Raise `PromptPassRequired` if another prompt comes first in a step; if false it gets the
            prompt's gates of the step before, and in the first step its own.
    """

    def __init__(self, rows: PromptRows, *, separate_passes: bool = False, texts: PromptTexts | None = None) -> None:
        self.rows, self.separate_passes, self._texts = rows, separate_passes, texts
        self.require_prompt_first = False
        self._batch = 0
        self._prompt_rows: tuple[int, ...] = ()
        self._prompt_gates: dict[str, list[Tensor]] = {}  # scope -> gates of the prompt's samples, pass by pass
        self._earlier: set[str] = set()  # scopes whose remembered gates the prompt's next pass replaces
        self._prompt_passed = False
        self._indices: dict[Any, Tensor] = {}

    def begin_step(self) -> None:
        """The next sampling step begins."""
        self._earlier = set(self._prompt_gates)
        self._prompt_passed = False

    def forget(self) -> None:
        """Forget the prompt's gates, because another prompt is going to be sampled."""
        self._prompt_gates.clear()
        self.begin_step()

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

    @property
    def prompt_rows(self) -> Sequence[int]:
        """The rows of the prompt in this pass."""
        return self._prompt_rows

    def prompt_texts(self, arguments: Mapping[str, Any]) -> Sequence[tuple[Tensor, Tensor | None]]:
        """The prompt's text conditionings, if this pass needs them: it has no sample of the prompt."""
        return [] if self._texts is None or self._prompt_rows or not self._remembers else self._texts(arguments)

    def remember(self, gates: Mapping[str, Sequence[Tensor]]) -> None:
        """Use these as the prompt's gates: scope -> ``(B, N)`` of each of its parts."""
        self._prompt_gates = {scope: list(values) for scope, values in gates.items()}
        self._earlier = set(gates)  # the prompt's own pass replaces them

    def __call__(self, scope: str, value: Tensor, named: Tensor | None = None) -> Tensor:
        """Gates of a scope, with the prompt's for the other samples.

        Args:
            scope: The scope.
            value: ``(B, N)`` gates by each sample's own text; ``(1, N)`` is returned as it is, unless it is of another
                prompt's pass and the prompt's gates are known.
            named: ``(B, N)`` or ``(1, N)`` bool, whether a sample's own text names the concept; ``None`` if unknown.
        """
        knows_prompt = self._remembers and not self._prompt_rows and scope in self._prompt_gates
        if value.shape[0] == 1 and knows_prompt:
            value = value.expand(self._batch, *value.shape[1:])
        if value.shape[0] != self._batch:
            return value
        sources = [value] if self._prompt_rows else []
        if self._remembers and self._prompt_rows:
            if scope in self._earlier:
                self._earlier.remove(scope)
                del self._prompt_gates[scope]
            rows = self._index((self._prompt_rows,), value.device)[0]
            self._prompt_gates.setdefault(scope, []).append(value[rows])
        elif knows_prompt:
            sources = [part.to(value) for part in self._prompt_gates[scope]]
        if not sources or len(self._prompt_rows) == self._batch:
            return value
        shared = torch.cat([part[self._source_index(len(part), value.device)] for part in sources]).mean(0)
        return shared if named is None else torch.where(named, value, shared)

    @property
    def _remembers(self) -> bool:
        # a compiled model keeps nothing from one pass to the next
        return self.separate_passes and not torch.compiler.is_compiling()

    def _source_index(self, remembered: int, device: torch.device) -> Tensor:
        return self._index(_source_rows(self._prompt_rows, self._batch, remembered), device)

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
        prompt_rows: Rows of the prompt in this pass; if there are none, all `remembered` rows of an earlier pass are.
    """
    sources = prompt_rows or tuple(range(remembered))
    others = [row for row in range(batch) if row not in prompt_rows]
    size = math.gcd(len(sources), len(others))  # samples of one part
    rank = {row: i for i, row in enumerate(others)}
    return tuple(
        tuple(sources[part + rank[row] % size] if row in rank else row for row in range(batch))
        for part in range(0, len(sources), size)
    )
