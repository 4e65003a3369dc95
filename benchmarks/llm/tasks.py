"""Tasks on strings that can be scored exactly: what the base model knows, and what adapters learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LETTERS = 10
PAD, BOS, EOS, SEP = range(4)
_FIRST = 4  # the first letter; the second alphabet follows the first
_MARKS = _FIRST + 2 * LETTERS
SHORTEST, LONGEST = 4, 6  # letters of an input; outputs are twice as long at most

Word = list[int]  # letters as numbers; the second alphabet from `LETTERS` on
Task = tuple[str, ...]  # what is done one after the other


def _lexicon(seed: int) -> Callable[[Word], Word]:
    """Letter by letter into the second alphabet, in an order of its own."""
    order = torch.randperm(LETTERS, generator=torch.Generator().manual_seed(seed)).tolist()
    return lambda word: [LETTERS + order[letter % LETTERS] for letter in word]


# Of the base model, alone and two after another.
BASE: dict[str, Callable[[Word], Word]] = {
    "copy": lambda word: word,
    "double": lambda word: [letter for letter in word for _ in range(2)],
    "every second": lambda word: word[::2],
    "capitals": lambda word: [LETTERS + letter % LETTERS for letter in word],
    "without first": lambda word: word[1:],
}
# Of the adapters.
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
    """Prompts and answers as token ids, of tasks drawn at random: ``BOS task .. input SEP`` and ``answer EOS``.

    Inputs are of the first alphabet, `SHORTEST` to `LONGEST` letters.
    """
    rng = torch.Generator().manual_seed(seed)
    found: list[tuple[Word, Word]] = []
    for pick in torch.randint(len(tasks), (size,), generator=rng).tolist():
        length = int(torch.randint(SHORTEST, LONGEST + 1, (), generator=rng))
        word = torch.randint(LETTERS, (length,), generator=rng).tolist()
        answer = word
        for name in tasks[pick]:
            answer = TASKS[name](answer)
        asked = [BOS, *(_NUMBER[name] for name in tasks[pick]), *(_FIRST + letter for letter in word), SEP]
        found.append((asked, [*(_FIRST + letter for letter in answer), EOS]))
    return found


@dataclass(frozen=True)
class Batch:
    """Token ids ``(B, T)`` padded on the right, their mask, and labels: -100 except on answers and their end."""

    ids: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def of(cls, rows: Sequence[tuple[Word, Word]]) -> Batch:
        longest = max(len(asked) + len(answer) for asked, answer in rows)
        ids, labels = torch.full((len(rows), longest), PAD), torch.full((len(rows), longest), -100)
        for i, (asked, answer) in enumerate(rows):
            both = asked + answer
            ids[i, : len(both)] = torch.tensor(both)
            labels[i, len(asked) : len(both)] = torch.tensor(answer)
        return cls(ids, (ids != PAD).long(), labels)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"input_ids": self.ids, "attention_mask": self.mask, "labels": self.labels}


def draw(tasks: Sequence[Task], size: int, seed: int) -> Batch:
    """See `examples`."""
    return Batch.of(examples(tasks, size, seed))


@torch.no_grad()
def scores(model: Callable[..., Any], batch: Batch) -> tuple[float, float]:
    """Share of answers that greedy decoding gets right to the last token, and of tokens right after the true ones.

    One pass with the true answers shown: while all are right, what greedy decoding sees is just that. The labels tell
    gates where the prompts end.
    """
    logits: Tensor = model(**batch.inputs).logits
    true = batch.labels[:, 1:]
    asked = true != -100
    right = (logits[:, :-1].argmax(-1) == true) & asked
    return (right | ~asked).all(1).float().mean().item(), (right.sum() / asked.sum()).item()


def accuracy(model: Callable[..., Any], batch: Batch) -> float:
    """The first of `scores`: share of whole answers."""
    return scores(model, batch)[0]
