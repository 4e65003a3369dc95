"""Prompts of eight kinds for pairs of concepts, and which of the two concepts each prompt names."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

KINDS = ("extra words", "position", "order", "wording", "weights", "long sentence", "near miss", "other language")
BEYOND = 34  # tags, more than 77 tokens with every encoder here


@dataclass(frozen=True)
class Pair:
    """A subject and a style, as the words of two LoRAs.

    Args:
        misses: Prompts with words that resemble the concepts' words, but name neither.
    """

    subject: str
    style: str
    misses: tuple[str, ...] = field(repr=False)


@dataclass(frozen=True)
class Case:
    """A prompt. `named` says whether it names the subject and the style of its pair."""

    kind: str
    prompt: str
    named: tuple[bool, bool]


# None of these concepts was used while the fit of the detectors was developed, see README.md.
PAIRS = (
    Pair("lighthouse", "stained glass", (
        "a glass of red wine", "rust and stained concrete", "a light bulb", "a small house by the sea",
        "light rain on the houses", "wine glasses on a shelf", "a stainless steel kettle", "a lightweight tent",
    )),
    Pair("teapot", "claymation", (
        "a cup of tea", "a clay jug", "a flower pot", "an animation studio", "a pottery class", "clay tennis court",
        "a teaspoon of sugar", "a steampunk pot",
    )),
    Pair("fox", "ukiyo-e", (
        "a foxglove in a garden", "a box of shoes", "the Tokyo skyline", "an ox on a field", "an e-mail on a screen",
        "a foxhole in the mud", "a ukulele", "a wolf in the woods",
    )),
    Pair("bicycle", "charcoal sketch", (
        "a barbecue with charcoal", "a sketch of a plan", "a motorcycle race", "a charcoal grey suit",
        "recycled paper", "a comedy sketch on a stage", "an icicle", "biceps training",
    )),
    Pair("samurai", "vaporwave", (
        "water vapor over a lake", "a wave on the shore", "a Japanese garden", "a microwave oven", "a heat wave",
        "a summer day", "an evaporating puddle", "a steam engine",
    )),
    Pair("red panda", "art nouveau", (
        "a red apple", "a panda eating bamboo", "an art gallery", "a nouveau riche couple", "a red car",
        "modern art", "martial arts", "a giant panda",
    )),
    Pair("ohwx woman", "mrbl style", (
        "a woman in the rain", "a marble statue", "hair style of the eighties", "a man and a woman", "an ox cart",
        "a stylish couple", "woman with an umbrella", "baroque style furniture",
    )),
    Pair("owl", "line art", (
        "a bowl of soup", "the finish line", "pop art poster", "an owner of a shop", "a line of people",
        "a growling bear", "an airline ticket", "street art on a wall",
    )),
)  # fmt: skip

# Concepts of the small model. It knows whole words only, so that words with common letters are no near misses for it.
NANO_PAIRS = (
    Pair("heart", "ember", ("a hearty meal", "a cold december", "the earth", "members of a band")),
    Pair("fish", "wood", ("a fishing boat", "woods in autumn", "a fisher", "a wooden box")),
    Pair("house", "shadow", ("a warehouse", "shady streets", "household goods", "a housing estate")),
    Pair("bolt", "hatch", ("a bolted door", "hatching eggs", "thunderbolts", "a hatchet")),
)

TAGS = (
    "finely rendered", "diffuse light", "crisp focus", "top quality", "stunning", "grand composition", "4k wallpaper",
    "cycles render", "backdrop", "hazy mood", "sepia colors", "telephoto shot", "rough texture", "clear edges",
    "gallery piece", "low key", "sunbeams", "tilted camera", "soft contrast", "earthy colors", "misty", "surreal mood",
    "portrait orientation", "empty background", "great detail", "cold tones", "global illumination", "strong outlines",
    "film still", "overexposed", "late afternoon", "rule of thirds", "medium close-up", "polished", "quiet", "aged",
    "hand made", "tack sharp",
)  # fmt: skip
_SCENES = (
    "a ferry in the fog", "a busy kitchen", "two chess players in a park", "a pumpkin on a doorstep",
    "a harbor crane at dawn", "a diver above a reef", "a piano in an empty hall", "a bakery in Lisbon",
    "an elk in a clearing", "a juggler on a square", "a desert road", "a tram in the evening",
)  # fmt: skip


def cases(pair: Pair, seed: int = 0) -> list[Case]:
    """About 60 prompts for a pair, in a fixed order."""
    draw = random.Random(f"{seed} {pair.subject} {pair.style}")
    made: list[Case] = []
    for make in (_extra, _position, _order, _wording, _weights, _long, _misses, _languages):
        made += make(pair, draw)
    return made


def bare(pair: Pair) -> tuple[str, str]:
    """Return the bare prompts that name the subject and the style."""
    return f"a {pair.subject}", f"a picture in {pair.style}"


def _tags(draw: random.Random, count: int) -> list[str]:
    return draw.sample(TAGS, count)


def _extra(pair: Pair, draw: random.Random) -> Iterator[Case]:
    s, k = pair.subject, pair.style
    cores = ((f"a {s} in {k}", (True, True)), (f"a {s} on a bench", (True, False)),
             (f"a boat in {k}", (False, True)), ("a boat on a bench", (False, False)))  # fmt: skip
    for count in (0, 4, 12, 30):  # up to 60 words
        for core, named in cores:
            yield Case("extra words", ", ".join([core, *_tags(draw, count)]), named)


def _position(pair: Pair, draw: random.Random) -> Iterator[Case]:
    words = ((pair.subject, (True, False)), (pair.style, (False, True)), ("a boat", (False, False)))
    for word, named in words:
        tags = _tags(draw, 14)
        for place in (0, 7, 14):
            yield Case("position", ", ".join([*tags[:place], word, *tags[place:]]), named)
        yield Case("position", ", ".join([*_tags(draw, BEYOND), word]), named)


def _order(pair: Pair, draw: random.Random) -> Iterator[Case]:
    s, k = pair.subject, pair.style
    scenes = draw.sample(_SCENES, 5)
    yield Case("order", ", ".join([k, scenes[0], s, *_tags(draw, 3)]), (True, True))
    yield Case("order", ", ".join([s, *_tags(draw, 6), scenes[1], k]), (True, True))
    yield Case("order", ", ".join([scenes[2], *_tags(draw, 6), k]), (False, True))
    yield Case("order", ", ".join([scenes[3], *_tags(draw, 6), s]), (True, False))
    yield Case("order", ", ".join([scenes[4], *_tags(draw, 6), scenes[0]]), (False, False))


def _wording(pair: Pair, draw: random.Random) -> Iterator[Case]:
    s, k = pair.subject, pair.style
    for text in ("an oil painting of one {}", "my little {}", "{} seen from above", "logo with a {}, vector", "the {}"):
        yield Case("wording", text.format(s), (True, False))
    yield Case("wording", s.upper(), (True, False))
    for text in (
        "{} illustration of a cottage",
        "a harbor, rendered in {}",
        "in the manner of {}: a vase",
        "a jar, {}",
    ):
        yield Case("wording", text.format(k), (False, True))
    yield Case("wording", f"{k.title()} Portrait", (False, True))
    yield Case("wording", f"{draw.choice(_SCENES)}, cross-stitch", (False, False))


def _weights(pair: Pair, draw: random.Random) -> Iterator[Case]:
    s, k = pair.subject, pair.style
    yield Case("weights", ", ".join([f"a ({s}:1.2)", *_tags(draw, 6)]), (True, False))
    yield Case("weights", ", ".join([f"a ({s}:0.7)", *_tags(draw, 6)]), (True, False))
    yield Case("weights", ", ".join([f"a boat, ({k}:1.4)", *_tags(draw, 6)]), (False, True))
    yield Case("weights", ", ".join(["a boat", f"({k}:0.8)", *_tags(draw, 6)]), (False, True))
    yield Case("weights", ", ".join([f"(a {s} in {k}:1.3)", *_tags(draw, 6)]), (True, True))
    yield Case("weights", ", ".join(["a (boat:1.5)", "(film still:1.3)", *_tags(draw, 6)]), (False, False))


def _long(pair: Pair, draw: random.Random) -> Iterator[Case]:
    for scene in draw.sample(_SCENES, 2):
        start = f"The picture shows {scene}, just as it begins to rain and people look for shelter; near the edge, "
        end = " that nobody has noticed, while a narrow path leads to the hills behind it."
        style = f" that nobody has noticed. Everything is done in {pair.style}, with great care for the distant hills."
        yield Case("long sentence", f"{start}almost out of sight, stands a {pair.subject}{end}", (True, False))
        yield Case("long sentence", f"{start}almost out of sight, stands a barrel{style}", (False, True))
        yield Case("long sentence", f"{start}almost out of sight, stands a barrel{end}", (False, False))


def _misses(pair: Pair, draw: random.Random) -> Iterator[Case]:
    for i, text in enumerate(pair.misses):
        yield Case("near miss", ", ".join([text, *_tags(draw, (0, 3, 10)[i % 3])]), (False, False))


def _languages(pair: Pair, draw: random.Random) -> Iterator[Case]:
    """Trigger words as they are, in sentences of other languages: a LoRA's words are seldom translated."""
    s, k = pair.subject, pair.style
    yield Case("other language", f"ein {s} auf einem Tisch, warmes Licht, viele Details", (True, False))
    yield Case("other language", f"un {s} dans une forêt, lumière douce", (True, False))
    yield Case("other language", f"un barco en el mar, {k}, muy detallado", (False, True))
    yield Case("other language", f"ein Boot am Ufer im Stil von {k}", (False, True))
    yield Case("other language", "ein altes Boot am Ufer, warmes Licht, viele Details", (False, False))
    yield Case("other language", "une femme lit un livre dans un café", (False, False))
