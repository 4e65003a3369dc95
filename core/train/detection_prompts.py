"""Prompts that concept detectors are fitted on: like those that people write, with and without the concepts.

They hold quality tags, long descriptions, several concepts far apart, the concept at the first, a middle and the last
position, and near misses: words that share a part with a concept's words.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

_NAMED, _JOINT, _NEUTRAL = 20, 12, 24  # prompts per concept (at least), with two concepts, and without any
_NEAR_MISSES, _PER_PROMPT = 48, 12  # near misses per concept, and how many of them stand in one prompt

_TAGS = (
    "masterpiece", "best quality", "highly detailed", "sharp focus", "8k", "soft lighting", "cinematic lighting",
    "depth of field", "bokeh", "vibrant colors", "intricate details", "trending on artstation", "photorealistic",
    "concept art", "high resolution", "studio lighting", "dramatic shadows", "volumetric light", "wide angle",
    "film grain", "ultra realistic", "golden hour", "symmetrical composition", "professional photography", "smooth",
    "elegant", "hdr", "natural skin texture", "award winning", "octane render",
)  # fmt: skip
_SCENES = (
    "a dog running on a beach", "a woman reading a book in a cafe", "an old man with a white beard",
    "a castle on a hill", "a city street in the rain", "a bowl of fruit on a wooden table", "a cat sleeping on a sofa",
    "a spaceship above a desert planet", "a knight in shining armor", "two children playing in the snow",
    "a red sports car on a mountain road", "a bird on a branch", "a portrait of a young man",
    "a forest path in autumn", "a sailing boat at sunset", "a robot in a factory", "a bouquet of roses",
    "a wolf howling at the moon", "a girl with long hair wearing a blue dress", "a bridge over a river",
    "a cup of coffee", "a mountain lake at dawn", "a chef cooking in a kitchen", "a horse in a green field",
)  # fmt: skip
_SENTENCES = (
    "The camera looks down a narrow street where people hurry past small shops with bright signs",
    "She stands next to the window and the evening light falls on her face",
    "In the background there are tall trees, and a few birds fly across a cloudy sky",
    "The room is full of books and papers, and a lamp on the desk gives a warm light",
    "On the left a small stream runs between the rocks, on the right there is an old stone wall",
)
_SINGLE = (
    "{}", "a {}", "a picture of {}", "{} in a park", "a close-up of {}", "{} at night", "a drawing of {}", "the {}",
    "photo of a {}", "{} on a white background",
)  # fmt: skip
_JOINT_TEMPLATES = ("{}, {}", "{} and {}", "a {} with {}", "{} in {}", "a {} {}", "{} next to a {}")
_OTHER_THINGS = (
    "dog", "woman", "house", "tree", "car", "oil painting", "watercolor", "comic", "flower", "moon", "fire", "stone",
    "cat", "glass", "garden", "sea",
)  # fmt: skip
_NEIGHBOURS = (
    "anime", "flat", "old", "japanese", "modern", "free", "black", "big", "dark", "cheap", "digital", "street",
    "classic", "my own", "paper", "life", "day", "book", "house", "man", "light", "work", "of the year", "in a box",
    "game", "dog", "line",
)  # fmt: skip
_SUFFIXES = ("y", "ed", "ing", "like", "less", "er", "beat", "land", "ic")
_PREFIXES = ("re", "un")


def detection_prompts(concepts: Sequence[Sequence[str]], seed: int = 0) -> list[str]:
    """About 36 + 24 N prompts, for N concepts; the last is the empty prompt.

    Args:
        concepts: Per expert, the words or phrases that name its concept in a prompt.
        seed: Random seed of the choice of words around the concepts.
    """
    draw = random.Random(seed)
    prompts: list[str] = []
    for words in concepts:
        for k in range(max(_NAMED, len(words))):
            prompts.append(_embed(_SINGLE[k % len(_SINGLE)].format(words[k % len(words)]), k, draw))
        misses = list(_near_misses(words))
        draw.shuffle(misses)
        for start in range(0, min(len(misses), _NEAR_MISSES), _PER_PROMPT):
            prompts.append(", ".join(misses[start : start + _PER_PROMPT]))
    for k in range(_JOINT if len(concepts) > 1 else 0):
        pair = [draw.choice(words) for words in draw.sample(concepts, 2)]
        prompts.append(_embed(_JOINT_TEMPLATES[k % len(_JOINT_TEMPLATES)].format(*pair), k, draw))
    for k in range(_NEUTRAL):
        thing = _SINGLE[k % len(_SINGLE)].format(draw.choice(_OTHER_THINGS))
        prompts.append(_embed(draw.choice((*_SCENES, thing)), k, draw))
    return [*dict.fromkeys(prompts), ""]


def _embed(core: str, kind: int, draw: random.Random) -> str:
    """Put the words into a longer prompt, in one of eight ways."""

    def tags(count: int) -> list[str]:
        return draw.sample(_TAGS, count)

    def sentence() -> str:
        return draw.choice(_SENTENCES)

    match kind % 8:
        case 0:
            return core
        case 1:
            return ", ".join([core, *tags(4)])
        case 2:
            return ", ".join([*tags((6, 16, 28)[kind // 8 % 3]), core])  # 28: beyond 77 tokens
        case 3:
            return ", ".join([*tags(5), core, *tags(9)])
        case 4:
            return ", ".join([draw.choice(_SCENES), core, *tags(3)])
        case 5:
            return f"{draw.choice(_SCENES)} with {core} in it. {sentence()}."
        case 6:
            return f"{sentence()}. {core}. {sentence()}, {', '.join(tags(4))}"
        case _:
            return ", ".join([core, *tags(20)])


def _near_misses(words: Sequence[str]) -> Iterator[str]:
    """Phrases with one word of a longer concept phrase, and words that contain a concept's last word."""
    for phrase in words:
        parts = phrase.split()
        if len(parts) > 1:
            for part in parts:
                for neighbour in _NEIGHBOURS:
                    yield f"{neighbour} {part}"
                    yield f"{part} {neighbour}"
        for suffix in _SUFFIXES:
            yield parts[-1] + suffix
        for prefix in _PREFIXES:
            yield prefix + parts[-1]
