"""Prompts for training gates: the concepts they name, and templates for users who only give the concepts' words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, cycle, islice

from ..errors import MergeError, name_some
from ..mole.router import concepts_in

# Shares of the kinds of prompts in the examples: several concepts together, one alone, none, the empty prompt.
JOINT, SINGLE, BASE, EMPTY = 0.35, 0.40, 0.10, 0.15

_SINGLE_TEMPLATES = ("{}", "a picture of {}", "{}, detailed", "a {} in a park", "close-up of {}", "{} at night")
_JOINT_TEMPLATES = ("{}, {}", "a picture of {} with {}", "{} and {}", "{} in {}", "a {} {}", "{}, detailed, {}")
_NEUTRAL_PROMPTS = (
    "a photo of a dog", "a street in the rain", "a portrait of a woman", "a bowl of fruit", "a mountain lake",
    "a red car", "a wooden chair", "an old man reading", "a city at night", "a cat on a sofa", "a forest path",
    "a cup of coffee", "a sailing boat", "a white horse", "a stone bridge", "a child with a balloon",
)  # fmt: skip


@dataclass(frozen=True)
class Prompt:
    """A prompt, and the indices of the experts whose concepts it names, ascending."""

    text: str
    named: tuple[int, ...]


def distinct_words(given: Sequence[Sequence[str]], in_files: Sequence[Sequence[str]]) -> list[list[str]]:
    """Per adapter, the words that name its concept: the given ones, or else those in its file.

    Words of a file that another adapter has too do not tell them apart and are left out.

    Args:
        given: Words that the user wrote, per adapter. in_files: Words in the metadata of its file, per adapter.
    """
    found = [list(own) or list(stored) for own, stored in zip(given, in_files, strict=True)]
    uses = Counter(word.lower() for words in found for word in {word.lower(): word for word in words}.values())
    return [
        words if own else [word for word in words if uses[word.lower()] == 1]
        for words, own in zip(found, given, strict=True)
    ]


def prompts_for(concepts: Sequence[Sequence[str]], texts: Sequence[str] = ()) -> list[Prompt]:
    """Training prompts of every kind, each once.

    Args:
        concepts: Per expert, the words or phrases that name its concept in a prompt.
        texts: The user's prompts. Missing kinds are added: every single concept, every two (and all) together, none of
            them, and the empty prompt. Without texts, all prompts are made from the words.

    Raises:
        MergeError: An expert without words, two experts with the same word, or an expert that none of the texts names.
    """
    concepts = [[word.strip() for word in words if word.strip()] for words in concepts]
    for i, words in enumerate(concepts):
        if not words:
            raise MergeError(
                f"LoRA number {i + 1} has no words that name its concept.",
                expected="its trigger words, or what a prompt calls its subject or style",
                found="none",
                remedy="write one line of words per LoRA",
            )
    _check_distinct(concepts)
    texts = list(dict.fromkeys(text.strip() for text in texts if text.strip()))
    rows = concepts_in(texts, concepts).tolist()
    given = [Prompt(text, _indices(row)) for text, row in zip(texts, rows, strict=True)]
    if texts:
        for i, words in enumerate(concepts):
            if not any(i in prompt.named for prompt in given):
                raise MergeError(
                    f"None of the prompts names LoRA number {i + 1}.",
                    expected=f"a prompt with {' or '.join(map(repr, words))}",
                    found=name_some([repr(text) for text in texts], 4),
                    remedy="use its words in a prompt, or leave the prompts empty to have some made from the words",
                )
    prompts = [*given, *_missing_kinds(concepts, {prompt.named for prompt in given}), Prompt("", ())]
    return list(dict.fromkeys(prompts))


def _missing_kinds(concepts: Sequence[Sequence[str]], present: set[tuple[int, ...]]) -> list[Prompt]:
    n = len(concepts)
    groups = [*((i,) for i in range(n)), *combinations(range(n), 2), *([tuple(range(n))] if n > 2 else [])]
    made: list[Prompt] = []
    for group in groups:
        if group in present:
            continue
        words = [islice(cycle(concepts[i]), len(_SINGLE_TEMPLATES)) for i in group]
        templates = _SINGLE_TEMPLATES if len(group) == 1 else _JOINT_TEMPLATES
        for template, chosen in zip(templates, zip(*words, strict=True), strict=True):
            text = template.format(*chosen) if len(group) < 3 else ", ".join(chosen)
            made.append(Prompt(text, _indices(concepts_in([text], concepts)[0].tolist())))
    if () not in present:
        rows = concepts_in(_NEUTRAL_PROMPTS, concepts).tolist()
        made += [Prompt(text, ()) for text, row in zip(_NEUTRAL_PROMPTS, rows, strict=True) if not any(row)]
    return made


def _indices(row: Sequence[bool]) -> tuple[int, ...]:
    return tuple(i for i, hit in enumerate(row) if hit)


def _check_distinct(concepts: Sequence[Sequence[str]]) -> None:
    expert_of: dict[str, int] = {}
    for i, words in enumerate(concepts):
        for word in words:
            other = expert_of.setdefault(word.lower(), i)
            if other != i:
                raise MergeError(
                    f"LoRAs number {other + 1} and {i + 1} are named by the same word.",
                    found=repr(word),
                    remedy="give each LoRA words of its own: the gates cannot tell them apart otherwise",
                )


def sampling_weights(prompts: Sequence[Prompt]) -> list[float]:
    """Probability of drawing each prompt: the kinds by their shares, all prompts of a kind alike."""
    kinds: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for i, prompt in enumerate(prompts):
        kind = "joint" if len(prompt.named) > 1 else "single" if prompt.named else "base" if prompt.text else "empty"
        kinds.setdefault((kind, prompt.named), []).append(i)
    share_of = {"joint": JOINT, "single": SINGLE, "base": BASE, "empty": EMPTY}
    groups = {kind: sum(k == kind for k, _ in kinds) for kind in share_of}
    weights = [0.0] * len(prompts)
    for (kind, _), members in kinds.items():
        for i in members:
            weights[i] = share_of[kind] / groups[kind] / len(members)
    total = sum(weights)
    return [weight / total for weight in weights]
