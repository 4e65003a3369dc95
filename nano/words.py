"""Vocabulary of the small model, with token ids of CLIP, and the wordings of its prompts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from zlib import crc32

from ..core.errors import MergeError

START, END = 49406, 49407  # CLIP's start and end tokens; the end token also pads to LENGTH
LENGTH = 77  # tokens per prompt

SUBJECTS = ("circle", "square", "triangle", "star", "moon", "cross", "ring", "diamond", "arrow", "flower", "tree",
            "mushroom", "heart", "bolt", "fish", "house")  # fmt: skip
STYLES = ("flat", "neon", "stripes", "dots", "pastel", "blueprint", "night", "checker",
          "ember", "hatch", "shadow", "wood")  # fmt: skip

# words of similar meaning, which get correlated embeddings, as in a trained encoder
SYNONYMS = {
    "heart": ("love",), "bolt": ("lightning", "flash"), "fish": ("trout", "salmon"), "house": ("home", "cottage"),
    "ember": ("fire", "burning"), "hatch": ("pencil", "sketch"), "shadow": ("paper", "cutout"),
    "wood": ("timber", "plank"),
}  # fmt: skip

IDS = {
    "circle": 7117, "square": 3999, "triangle": 14615, "star": 1565, "moon": 3293, "cross": 3417, "ring": 2540,
    "diamond": 6235, "arrow": 11149, "flower": 4055, "tree": 2677, "mushroom": 13011, "heart": 1936, "bolt": 13131,
    "fish": 2759, "house": 1212, "flat": 6313, "neon": 13919, "stripes": 14239, "dots": 19019, "pastel": 19457,
    "blueprint": 30594, "night": 930, "checker": 45883, "ember": 47049, "hatch": 17809, "shadow": 7068, "wood": 1704,
    "love": 793, "lightning": 7756, "flash": 5815, "trout": 14853, "salmon": 9137, "home": 1137, "cottage": 12155,
    "fire": 1769, "burning": 8405, "pencil": 11200, "sketch": 5269, "paper": 2802, "cutout": 45016, "timber": 16246,
    "plank": 30991, "a": 320, "an": 550, "the": 518, "in": 530, "of": 539, "on": 525, "and": 537, "with": 593,
    "as": 601, "for": 556, "me": 614, "style": 1844, "look": 1012, "drawing": 3610, "picture": 1674, "painting": 3086,
    "image": 2867, "drawn": 8893, "shown": 8506, "made": 1105, "draw": 4001, "paint": 5185, "please": 1474,
    "one": 637, "single": 2688, "simple": 4129, "little": 1274, "small": 2442, "nice": 1805, "icon": 5646,
    "sign": 2292, "symbol": 13085, ",": 267, ".": 269,
}  # fmt: skip

_KNOWN_IDS = frozenset(IDS.values())

# {s}: subject, {k}: style
WORDINGS = ("a {s} in {k} style", "{k} style {s}", "a {k} picture of a {s}", "{s}, {k}",
            "the {s}, drawn in {k} style", "a simple {s} with a {k} look")  # fmt: skip
UNSEEN_WORDINGS = ("please paint one {k} {s}", "an icon of the {s} made in {k}")  # not used to train or calibrate


def prompt(subject: str, style: str, wording: str = WORDINGS[0]) -> str:
    """Format a wording with subject and style, with "an" before vowels."""
    return with_articles(wording.format(s=subject, k=style))


def with_articles(text: str) -> str:
    """Replace "a" by "an" before vowels."""
    return re.sub(r"\ba (?=[aeiou])", "an ", text)


def tokens(text: str, *, any_words: bool = False) -> list[int]:
    """Tokenize a prompt: token ids between start and end tokens, padded to `LENGTH` as by CLIP.

    Args:
        text: The prompt.
        any_words: Give words that the model was not trained on a token derived from their letters, and leave out what
            does not fit. They have no meaning for the model; text gates can be fitted and tried with them.

    Raises:
        MergeError: A word is not in the vocabulary, or there are too many words.
    """
    words: Sequence[str] = re.findall(r"[^\W_]+|[^\w\s]", text.lower())
    if any_words:
        words = words[: LENGTH - 2]
        return [START, *map(_any_token, words), *([END] * (LENGTH - 1 - len(words)))]
    unknown = [word for word in words if word not in IDS]
    if unknown:
        raise MergeError(
            "The small model does not know these words.",
            expected=f"words such as {', '.join(SUBJECTS)}; {', '.join(STYLES)}",
            found=", ".join(unknown),
        )
    if len(words) > LENGTH - 2:
        raise MergeError("The prompt is too long.", expected=f"at most {LENGTH - 2} words", found=len(words))
    return [START, *(IDS[word] for word in words), *([END] * (LENGTH - 1 - len(words)))]


def _any_token(word: str) -> int:
    """The word's token, or one of those from 512 on that stand for no known word."""
    if word in IDS:
        return IDS[word]
    token = 512 + crc32(word.encode()) % (START - 512)
    while token in _KNOWN_IDS:
        token += 1
    return token
