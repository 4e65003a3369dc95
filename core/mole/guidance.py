"""Guidance: where a prompt and a negative one are computed side by side, both take the gates of the prompt.

Guidance goes from the negative prompt's prediction to the prompt's and beyond. With a LoRA at work in only one of the
two, it would multiply all that the LoRA does; with the same gates in both, a mix is as loud as a merged LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Which samples of a batch are the prompt's, told from the arguments of the model's forward and the batch's size.
Rows = Callable[[Mapping[str, Any], int], Sequence[int]]


class PromptFirst(Exception):
    """A negative prompt came before the prompt whose gates it takes: compute the prompt, and then ask again."""


class PromptFollowing:
    """Gives the samples of a negative prompt the gates of the prompt.

    Args:
        rows: Which samples of a batch are the prompt's; the others follow them, in order. Where there are more of the
            prompt's (a prompt of several parts), the mean.
        apart: Whether the two may come in passes of their own. Then what the prompt's gates were is kept, from one
            `forget` to the next.

    Attributes:
        on: Whether to; off, every sample has the gates of its own prompt.
        wait: Whether a negative prompt that comes first raises `PromptFirst`; else it has its own gates.
    """

    def __init__(self, rows: Rows, *, apart: bool = False) -> None:
        self.rows, self.apart, self.on, self.wait = rows, apart, True, False
        self._batch = 0
        self._own: tuple[int, ...] = ()
        self._seen: dict[str, list[Tensor]] = {}  # scope -> gates of the prompt's samples, pass by pass
        self._begun = False
        self._indices: dict[Any, Tensor] = {}

    def forget(self) -> None:
        """Another step of sampling begins."""
        self._seen.clear()
        self._begun = False

    def start(self, arguments: Mapping[str, Any], batch: int) -> None:
        """A pass of the model begins, of so many samples.

        Raises:
            PromptFirst: See `wait`.
        """
        self._batch, self._own = batch, tuple(self.rows(arguments, batch))
        if self._remembers and self._own:
            self._begun = True
        elif self._remembers and self.wait and not self._begun:
            raise PromptFirst

    def __call__(self, scope: str, value: Tensor) -> Tensor:
        """The gates ``(B, N)`` of a scope with the negative prompt's samples following; ``(1, N)`` for all stay."""
        if not self.on or value.shape[0] != self._batch:
            return value
        source = value
        if self._remembers:
            if self._own:
                self._seen.setdefault(scope, []).append(value[self._index((self._own,), value.device)][0])
            elif scope in self._seen:
                source = torch.cat(self._seen[scope])
        if len(self._own) == self._batch or (not self._own and source is value):
            return value
        return source[self._index(_sources(self._own, self._batch, len(source)), value.device)].mean(0)

    @property
    def _remembers(self) -> bool:
        return self.on and self.apart and not torch.compiler.is_compiling()  # which keeps nothing from pass to pass

    def _index(self, rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
        if torch.compiler.is_compiling():
            return torch.tensor(rows, device=device)
        key = (rows, device)
        if key not in self._indices:  # copied once: a copy in every pass would make a GPU wait
            self._indices[key] = torch.tensor(rows, device=device)
        return self._indices[key]


def _sources(own: tuple[int, ...], batch: int, known: int) -> tuple[tuple[int, ...], ...]:
    """Per part of the prompt, whose gates each sample takes: ``parts x batch`` positions.

    Args:
        own: The prompt's samples in this pass; if there are none, all the `known` ones of passes before are.
    """
    followed = own or tuple(range(known))
    others = [row for row in range(batch) if row not in own]
    size = math.gcd(len(followed), len(others))  # samples of one part
    place = {row: i for i, row in enumerate(others)}
    return tuple(
        tuple(followed[part + place[row] % size] if row in place else row for row in range(batch))
        for part in range(0, len(followed), size)
    )
