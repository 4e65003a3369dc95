"""The model with its tasks: prompts as rows of the table of hidden states, and the scores of a model on them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from legomole.hosts.transformers.calibration import NEUTRAL_TEXTS
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import DynamicCache

from ..common import Say, mean
from .data import HELD_OUT, TASKS, Examples, prompt_ids, read, texts
from .model import Upper, by_length, last_logits, load_pretrained, padded

_BATCH = 25


@dataclass(frozen=True)
class Size:
    """Number of prompts per task.

    Args:
        test: For the reported scores. dev: For the gain of an adapter. swept: Those of `dev` that choose strengths.
        held_out: Of each held-out task.
        texts: News texts for the perplexity.
    """

    test: int = 300
    dev: int = 100
    swept: int = 50
    held_out: int = 150
    texts: int = 32


class World:
    """Scores models on the tasks.

    Args:
        model: Folder of the pretrained model. data: Folder with the clones. work: Folder for hidden states.
        size: Number of prompts.
        say: Called with progress messages. dtype: Dtype of the model.
    """

    def __init__(
        self, model: Path, data: Path, work: Path, size: Size, say: Say, dtype: torch.dtype = torch.bfloat16
    ) -> None:
        whole, self.tokenizer = load_pretrained(model, dtype)
        self._upper, self.size, self._data, self._work, self._say = Upper(whole), size, data, work, say
        self.model: Any = self._upper.model
        self._tasks: dict[str, Examples] = {}
        self._instructed: dict[str, list[tuple[int, ...]]] = {}

    def task(self, name: str) -> Examples:
        """The prompts of a task, as rows of the table of hidden states."""
        if name not in self._tasks:
            task = next(task for task in (*TASKS, *HELD_OUT) if task.name == name)
            examples = read(self._data, task, self.tokenizer, self.size.test, self.size.dev)
            if task in HELD_OUT:  # only these are used
                examples = replace(examples, test=examples.test[: self.size.held_out], dev=(), train=())
            rows = iter(self._rows([e.ids for e in (*examples.test, *examples.dev, *examples.train)], name))
            splits = {
                split: tuple(replace(example, ids=next(rows)) for example in getattr(examples, split))
                for split in ("test", "dev", "train")
            }
            self._tasks[name] = replace(examples, **splits)
            self._say(f"{name}: {', '.join(f'{len(part)} {split}' for split, part in splits.items())} prompts")
        return self._tasks[name]

    @cached_property
    def neutral(self) -> list[tuple[int, ...]]:
        """Texts for no task, on which the base model is measured."""
        lines = [self.tokenizer(line, add_special_tokens=False)["input_ids"] for line in NEUTRAL_TEXTS]
        return self._rows(lines, "neutral")

    def instructed(self, name: str) -> list[tuple[int, ...]]:
        """Prompts of a task's instruction and unrelated sentences."""
        if name not in self._instructed:
            prompts = [prompt_ids(self.tokenizer, self.task(name).task, line) for line in NEUTRAL_TEXTS[:8]]
            self._instructed[name] = self._rows(prompts, f"instructed {name}")
        return self._instructed[name]

    @cached_property
    def _news(self) -> tuple[list[list[int]], list[tuple[int, ...]]]:
        """Token ids and rows of the news texts."""
        news = texts(self._data, self.tokenizer, self.size.texts)
        return news, self._rows(news, "news")

    def _rows(self, prompts: Sequence[Sequence[int]], name: str) -> list[tuple[int, ...]]:
        return self._upper.rows(prompts, self._work / f"states-{name.replace(' ', '-')}.pt")

    def accuracies(self, model: Any, names: Iterable[str], *, dev: int = 0, whole: bool = False) -> list[float]:
        """Accuracy on each task: how often the right label's first token is the likeliest of the labels'.

        Args:
            model: `self.model`, changed in place.
            names: Tasks. dev: Number of dev prompts to use; 0 for the test prompts.
            whole: Do not share the instruction of the prompts, as gates need to read them.
        """
        return [self._accuracy(model, self.task(name), dev, whole) for name in names]

    @torch.inference_mode()
    def _accuracy(self, model: Any, examples: Examples, dev: int, whole: bool) -> float:
        prompts = examples.dev[:dev] if dev else examples.test
        first = list(examples.first)
        right = 0
        shared = 0 if whole else examples.shared
        prefix = _prefix(model, prompts[0].ids[:shared]) if shared else None
        for chosen in by_length([len(prompt.ids) for prompt in prompts], _BATCH):
            ids = [prompts[i].ids[shared:] for i in chosen]
            logits = last_logits(model, ids) if prefix is None else _continued(model, ids, prefix)
            label = torch.tensor([prompts[i].label for i in chosen])
            right += int((logits[:, first].argmax(1) == label).sum())
        return right / len(prompts)

    def held_out(self, model: Any, *, whole: bool = False) -> float:
        """Mean accuracy on tasks that no adapter was trained on."""
        return mean(self.accuracies(model, [task.name for task in HELD_OUT], whole=whole))

    @torch.inference_mode()
    def perplexity(self, model: Any) -> float:
        """Perplexity on news texts."""
        losses: list[float] = []
        for rows, ids in zip(*self._news[::-1], strict=True):
            logits = model(input_ids=torch.tensor([rows]), use_cache=False).logits[0, :-1]
            losses.append(float(cross_entropy(logits.float(), torch.tensor(ids[1:]))))
        return math.exp(mean(losses))


def _prefix(model: Any, rows: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of the rows that all prompts of a task begin with."""
    cache = DynamicCache()
    model.model(input_ids=torch.tensor([rows]), past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]


def _continued(model: Any, rows: Sequence[Sequence[int]], prefix: list[tuple[Tensor, Tensor]]) -> Tensor:
    """Logits ``(B, V)`` after prompts whose beginning is in `prefix`."""
    ids, mask = padded(rows)
    B, length = len(rows), prefix[0][0].shape[2]
    cache = DynamicCache()
    for i, (keys, values) in enumerate(prefix):
        cache.update(keys.expand(B, -1, -1, -1), values.expand(B, -1, -1, -1), i)
    output = model(
        input_ids=ids,
        attention_mask=torch.cat([mask.new_ones(B, length), mask], 1),
        position_ids=length + (mask.cumsum(1) - 1).clamp_min(0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return output.logits[:, -1]
