"""Tasks on strings that can be scored exactly: tasks of the base model and tasks of the adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LETTERS = 10
PAD, BOS, EOS, SEP = range(4)
_FIRST = 4  # token of the first letter; the second alphabet follows the first
_MARKS = _FIRST + 2 * LETTERS
SHORTEST, LONGEST = 4, 6  # letters of an input; outputs are at most twice as long

Word = list[int]  # letters as numbers; the second alphabet starts at `LETTERS`
Task = tuple[str, ...]  # operations in their order


def _lexicon(seed: int) -> Callable[[Word], Word]:
    """Return a letter-by-letter translation into a permutation of the second alphabet."""
    order = torch.randperm(LETTERS, generator=torch.Generator().manual_seed(seed)).tolist()
    return lambda word: [LETTERS + order[letter % LETTERS] for letter in word]


# operations of the base model, which also does two in succession
BASE: dict[str, Callable[[Word], Word]] = {
    "copy": lambda word: word,
    "double": lambda word: [letter for letter in word for _ in range(2)],
    "every second": lambda word: word[::2],
    "capitals": lambda word: [LETTERS + letter % LETTERS for letter in word],
    "without first": lambda word: word[1:],
}
# operations of the adapters
NEW: dict[str, Callable[[Word], Word]] = {
    "reverse": lambda word: word[::-1],
    "sort": sorted,
    "next letter": lambda word: [(letter + 1) % LETTERS for letter in word],
    "rotate": lambda word: [*word[1:], *word[:1]],
    "language A": _lexicon(1),
    "language B": _lexicon(2),
}
TASKS = BASE | NEW
_NUMBER = {name: _MARKS + i for i, name in enumerate(TASKS)}
VOCABULARY = _MARKS + len(TASKS)


def examples(tasks: Sequence[Task], size: int, seed: int) -> list[tuple[Word, Word]]:
    """Return prompts and answers of random tasks as token ids: ``BOS task .. input SEP`` and ``answer EOS``.

    Inputs have `SHORTEST` to `LONGEST` letters of the first alphabet.
    """
    rng = torch.Generator().manual_seed(seed)
    pairs: list[tuple[Word, Word]] = []
    for pick in torch.randint(len(tasks), (size,), generator=rng).tolist():
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=rng))
        word = torch.randint(LETTERS, (length,), generator=rng).tolist()
        answer = word
        for name in tasks[pick]:
            answer = TASKS[name](answer)
        prompt = [BOS, *(_NUMBER[name] for name in tasks[pick]), *(_FIRST + letter for letter in word), SEP]
        pairs.append((prompt, [*(_FIRST + letter for letter in answer), EOS]))
    return pairs


@dataclass(frozen=True)
class Batch:
    """Token ids ``(B, T)`` padded on the right, their mask, and labels, which are -100 except on the answers."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Word, Word]]) -> Batch:
        longest = max(len(prompt) + len(answer) for prompt, answer in rows)
        ids, labels = torch.full((len(rows), longest), PAD), torch.full((len(rows), longest), -100)
        for i, (prompt, answer) in enumerate(rows):
            both = prompt + answer
            ids[i, : len(both)] = torch.tensor(both)
            labels[i, len(prompt) : len(both)] = torch.tensor(answer)
        return cls(ids, (ids != PAD).long(), labels)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}


def draw(tasks: Sequence[Task], size: int, seed: int) -> Batch:
    """Return a batch of `examples`."""
    return Batch.of(examples(tasks, size, seed))


@torch.no_grad()
def scores(model: Callable[..., Any], batch: Batch) -> tuple[float, float]:
    """Return the share of answers that greedy decoding gets right, and of tokens that are right after the true ones.

    One forward pass with the true answers as input suffices: greedy decoding sees the same tokens up to its first
    error. The labels tell gates where the prompts end.
    """
    logits: Tensor = model(**batch.inputs).logits
    true = batch.labels[:, 1:]
    is_answer = true != -100
    right = (logits[:, :-1].argmax(-1) == true) & is_answer
    return (right | ~is_answer).all(1).float().mean().item(), (right.sum() / is_answer.sum()).item()


def accuracy(model: Callable[..., Any], batch: Batch) -> float:
    """Return the share of answers that are right as a whole."""
    return scores(model, batch)[0]
