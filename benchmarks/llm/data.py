"""Tasks read from a clone of ``circle-hit/SAPT`` (CL_Benchmark) and one of ``suzgunmirac/BIG-Bench-Hard``.

Every task is a classification whose labels differ in their first token, so that one forward pass answers a prompt.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LONGEST = 40  # tokens of a prompt
TRAINED = 800  # prompts per task at most
_LONG = "CL_Benchmark/Long_Sequence"
_SUPER = "CL_Benchmark/SuperNI"


@dataclass(frozen=True)
class Task:
    """A classification task.

    Args:
        name: Name in tables.
        folder: Folder (or file) below the data folder.
        instruction: First line of a prompt.
        labels: Answers; inputs with other answers are left out.
        rank: Rank of the task's adapter. layers: Layers of the adapter, ``"all"`` or ``"qv"``.
        steps: Training steps.
        cut: Tokens that a prompt is cut to, which still leaves a topic or an opinion; 0: long texts are left out.
    """

    name: str
    folder: str
    instruction: str
    labels: tuple[str, ...]
    rank: int = 8
    layers: str = "all"
    steps: int = 120
    cut: int = 0


_RELATIONS = ("entailment", "neutral", "contradiction")
_STARS = ("negative", "positive")  # "very negative" and "very positive" begin with the same token
TASKS = (
    Task("sst2", f"{_LONG}/sst2", "Is the sentiment Good or Bad?", ("Good", "Bad")),
    Task("emotion", f"{_SUPER}/task875_emotion_classification", "Emotion: love, joy, anger, sadness, fear or surprise?",
         ("love", "joy", "anger", "sadness", "fear", "surprise"), rank=16),
    Task("qqp", f"{_LONG}/qqp", "Do both sentences have the same meaning, yes or no?", ("yes", "no")),
    Task("sentiment140", f"{_SUPER}/task1687_sentiment140_classification", "Is this tweet positive or negative?",
         ("positive", "negative"), steps=80, layers="qv"),
    Task("agnews", f"{_LONG}/agnews", "Topic: World, Sports, Business, Science or Technology?",
         ("World", "Sports", "Business", "Science or Technology"), steps=80, cut=LONGEST),
    Task("dbpedia", f"{_LONG}/dbpedia", "Which category does this article belong to?",
         ("Company", "Educational Institution", "Artist", "Athlete", "Office Holder", "Mean of Transportation",
          "Building", "Natural Place", "Village", "Animal", "Plant", "Album", "Film", "Written Work"),
         steps=80, cut=LONGEST),
    Task("yelp", f"{_LONG}/yelp", "Is this review negative or positive?", _STARS, steps=80, cut=34),
    Task("amazon", f"{_LONG}/amazon", "Is the buyer negative or positive?", _STARS, rank=16, layers="qv",
         steps=80, cut=34),
    Task("imdb", f"{_LONG}/imdb", "Is this film Good or Bad?", ("Good", "Bad"), steps=80, cut=34),
    Task("mnli", f"{_LONG}/mnli", "Entailment, neutral or contradiction?", _RELATIONS),
)  # fmt: skip
"""Tasks for adapters, in the order of trial."""
HELD_OUT = (
    Task("sst2 as POS or NEG", f"{_SUPER}/task363_sst2_polarity_classification", "Sentiment: POS or NEG?",
         ("POS", "NEG")),
    Task("boolean expressions", "bbh/boolean_expressions.json", "Evaluate.", ("True", "False")),
    Task("sports", "bbh/sports_understanding.json", "Answer yes or no.", ("yes", "no")),
    Task("wic", f"{_LONG}/wic", "Is the word used in the same sense, True or False?", ("True", "False")),
)  # fmt: skip
"""Tasks that no adapter was trained on."""


@dataclass(frozen=True)
class Example:
    """A prompt as token ids, with the index of its label."""

    ids: tuple[int, ...]
    label: int


@dataclass(frozen=True)
class Examples:
    """Disjoint examples of a task.

    Args:
        task: The task.
        first: First token of every label.
        shared: Number of tokens that all prompts begin with: the instruction.
        test, dev, train: The splits. Their labels are balanced as far as there are enough of each.
    """

    task: Task
    first: tuple[int, ...]
    shared: int
    test: tuple[Example, ...]
    dev: tuple[Example, ...]
    train: tuple[Example, ...]


def prompt_ids(tokenizer: Any, task: Task, text: str) -> list[int]:
    """Token ids of instruction, text and ``Answer:``."""
    before, middle, after = (
        tokenizer(part, add_special_tokens=False)["input_ids"]
        for part in (f"{task.instruction}\n", text.strip(), "\nAnswer:")
    )
    return before + (middle[: task.cut - len(before) - len(after)] if task.cut else middle) + after


def read(data: Path, task: Task, tokenizer: Any, tested: int, dev: int) -> Examples:
    """Read a task, split by a fixed shuffle: dev and test are one file in the source, so that we split anew.

    Raises:
        FileNotFoundError: The data folder lacks the task.
    """
    first = tuple(tokenizer(" " + label, add_special_tokens=False)["input_ids"][0] for label in task.labels)
    if len(set(first)) < len(first):
        raise ValueError(f"{task.name}: labels begin with the same token")
    by_label: list[list[Example]] = [[] for _ in task.labels]
    for text, answer in sorted(_instances(data, task)):
        if answer not in task.labels:
            continue
        ids = prompt_ids(tokenizer, task, text)
        if len(ids) <= LONGEST:
            label = task.labels.index(answer)
            by_label[label].append(Example(tuple(ids), label))
    draw = random.Random(task.name)
    for part in by_label:
        draw.shuffle(part)
    ordered = _alternate(by_label)
    shared = len(tokenizer(f"{task.instruction}\n", add_special_tokens=False)["input_ids"])
    test, tuned, train = ordered[:tested], ordered[tested : tested + dev], ordered[tested + dev :]
    draw.shuffle(train)
    return Examples(task, first, shared, tuple(test), tuple(tuned), tuple(train[:TRAINED]))


def texts(data: Path, tokenizer: Any, count: int = 32, length: int = 96) -> list[list[int]]:
    """Token ids of the beginnings of news articles, which no adapter was trained on, for perplexity."""
    task = Task("xsum", f"{_SUPER}/task1290_xsum_summarization", "", ())
    articles = sorted({text for text, _ in _instances(data, task)})
    random.Random(0).shuffle(articles)
    ids = (tokenizer(article[:2000], add_special_tokens=False)["input_ids"][:length] for article in articles)
    return [part for part in ids if len(part) == length][:count]


def _instances(data: Path, task: Task) -> set[tuple[str, str]]:
    """All distinct (input, answer) of a task's files."""
    if task.folder.endswith(".json"):
        examples = json.loads(_find(data, task.folder).read_text())["examples"]
        return {(example["input"], example["target"]) for example in examples}
    files = [file for file in sorted(_find(data, task.folder).iterdir()) if file.stem in ("train", "dev", "test")]
    rows = [row for file in files for row in json.loads(file.read_text())["Instances"]]
    answers = [row["output"] if isinstance(row["output"], str) else row["output"][0] for row in rows]
    return {(row["input"], answer) for row, answer in zip(rows, answers, strict=True)}


def _find(data: Path, name: str) -> Path:
    """A task's path in the data folder itself or in a clone below it."""
    for path in (data / name, *data.glob(f"*/{name}")):
        if path.exists():
            return path
    raise FileNotFoundError(f"{data} has no {name}: clone circle-hit/SAPT and suzgunmirac/BIG-Bench-Hard into it")


def _alternate(by_label: Sequence[list[Example]]) -> list[Example]:
    """Labels in turn, while a label has examples left."""
    longest = max(map(len, by_label))
    return [part[i] for i in range(longest) for part in by_label if i < len(part)]
