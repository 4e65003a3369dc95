"""Labelled sentences from templates; those for testing have other words and other templates.

Every label is an exclusive or of two properties of the sentence, so that the base model's embedding does not show it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import product

Labelled = tuple[str, int]
_GOOD = (
    ("good", "great", "lovely", "funny", "clever", "warm", "fresh", "pleasant"),
    ("excellent", "charming", "delightful", "brilliant"),
)
_BAD = (
    ("bad", "awful", "ugly", "boring", "stupid", "cold", "stale", "nasty"),
    ("terrible", "dreadful", "dull", "poor"),
)
_THINGS = (("film", "meal", "book", "hotel", "song"), ("concert", "play", "room"))
_REVIEWS = (
    ("The {0} was {1}{2}.", "This {0} is {1}{2}.", "I found the {0} {1}{2}."),
    ("In the end the {0} was {1}{2}.",),
)
_WOMEN = (("Anna", "Mary", "Julia", "Emma", "Laura", "Sarah"), ("Alice", "Helen", "Linda"))
_MEN = (("Tom", "Peter", "John", "Paul", "David", "Mark"), ("George", "Robert", "Frank"))
_DONE = (("thanked", "followed", "called", "painted", "helped", "paid"), ("visited", "praised", "blamed"))
_CAME = (("arrived", "left", "spoke", "woke up", "ate"), ("sang", "departed", "sat down"))
_WARMTH = (
    (("warm", "hot", "steaming", "heated", "burning"), ("boiling", "scalding")),
    (("cold", "chilly", "freezing", "cool", "ice-cold"), ("frozen", "icy")),
)


def _review(pick: random.Random, unseen: int) -> Labelled:
    """Label: whether the review is good; "not" inverts it."""
    good, negated = pick.random() < 0.5, pick.random() < 0.5
    adjective = pick.choice((_GOOD if good else _BAD)[unseen])
    frame, thing = pick.choice(_REVIEWS[unseen]), pick.choice(_THINGS[unseen])
    return frame.format(thing, "not " if negated else "", adjective), int(good != negated)


def _actor(pick: random.Random, unseen: int) -> Labelled:
    """Label: whether the woman is the actor, in active or passive voice."""
    woman, man, done = pick.choice(_WOMEN[unseen]), pick.choice(_MEN[unseen]), pick.choice(_DONE[unseen])
    first, passive = pick.random() < 0.5, pick.random() < 0.5
    a, b = (woman, man) if first else (man, woman)
    rest = pick.choice((("", " today", " at home"), (" last week", " again"))[unseen])
    return f"{a} was {done} by {b}{rest}." if passive else f"{a} {done} {b}{rest}.", int(first != passive)


def _order(pick: random.Random, unseen: int) -> Labelled:
    """Label: whether the woman was first."""
    woman, man, came = pick.choice(_WOMEN[unseen]), pick.choice(_MEN[unseen]), pick.choice(_CAME[unseen])
    first, before = pick.random() < 0.5, pick.random() < 0.5
    a, b = (woman, man) if first else (man, woman)
    return f"{a} {came} {'before' if before else 'after'} {b}.", int(first == before)


def _pair(pick: random.Random, unseen: int) -> Labelled:
    """Label: whether both things are warm or both cold."""
    cold, alike = pick.random() < 0.5, pick.random() < 0.5
    x, y = pick.choice(_WARMTH[cold][unseen]), pick.choice(_WARMTH[cold if alike else not cold][unseen])
    a, b = pick.sample((("tea", "soup", "bath", "water", "milk"), ("coffee", "broth", "rice"))[unseen], 2)
    return f"The {a} is {x} and the {b} is {y}.", int(alike)


TASKS: dict[str, Callable[[random.Random, int], Labelled]] = {
    "review": _review, "actor": _actor, "order": _order, "pair": _pair
}  # fmt: skip


def texts(task: str, size: int, seed: int, *, unseen: bool) -> list[Labelled]:
    """Return sentences with their labels 0 or 1; `unseen` ones have the words and templates reserved for tests."""
    pick = random.Random(f"{task} {seed}")
    return [TASKS[task](pick, int(unseen)) for _ in range(size)]


def together(tasks: Sequence[str], size: int, seed: int) -> list[tuple[str, str, int, str, int]]:
    """Return texts of two sentences of different tasks: text, first task, its label, second task, its label."""
    pick = random.Random(f"together {seed}")
    rows: list[tuple[str, str, int, str, int]] = []
    for _ in range(size):
        a, b = pick.sample(list(tasks), 2)
        (first, x), (second, y) = TASKS[a](pick, 1), TASKS[b](pick, 1)
        rows.append((f"{first} {second}", a, x, b, y))
    return rows


_VERBS = (("repair", "sell", "clean", "buy"), ("draw", "carry", "build", "hide", "wash", "measure"))
_OBJECTS = (("bicycle", "piano", "window", "tent"), ("clock", "sofa", "drum", "lamp", "ladder", "basket"))


def questions(*, unseen: bool) -> list[tuple[str, str]]:
    """Return questions in two wordings each, which a good sentence encoder maps to similar embeddings."""
    return [
        (f"How do I {verb} a {thing}?", f"What is the best way to {verb} a {thing}?")
        for verb, thing in product(_VERBS[unseen], _OBJECTS[unseen])
    ]
