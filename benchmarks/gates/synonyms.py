"""How far words carry that the user did not list, with and without further words in the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from .encoders import ChunkEncoder
from .measure import gate_values, share, token_gates
from .measure import measure as measure_pair
from .prompts import PAIRS


@dataclass(frozen=True)
class Concept:
    """A concept whose name is listed.

    Args:
        further: Paraphrases that a user may list too.
        others: Paraphrases that nobody listed. translated: The name in other languages.
    """

    name: str
    further: tuple[str, ...]
    others: tuple[str, ...]
    translated: tuple[str, ...] = ()


@dataclass(frozen=True)
class Result:
    """Gates of a word that is not listed, relative to that of the name.

    Args:
        kind: ``paraphrase`` or ``translation``.
        alone: With only the name listed. further: With further words listed.
    """

    concept: str
    word: str
    kind: str
    alone: float
    further: float


# the first pair was used while the fit was developed, the others were not
CONCEPTS: tuple[tuple[Concept, Concept], ...] = (
    (Concept("heart", ("heart shape", "love symbol"), ("a valentine", "a cardiac organ"), ("ein Herz", "un cœur")),
     Concept("ember style", ("burning", "glowing coals"), ("blazing", "on fire", "smouldering"))),
    (Concept("lighthouse", ("light tower", "coastal tower"), ("a beacon", "a pharos"), ("ein Leuchtturm", "un phare")),
     Concept("stained glass", ("leaded window", "church window"), ("a mosaic of coloured panes", "vitrage"))),
    (Concept("fox", ("vixen", "fox cub"), ("a vulpine animal", "Reynard"), ("ein Fuchs", "un zorro")),
     Concept("ukiyo-e", ("japanese woodblock print", "woodcut"), ("like Hokusai", "an Edo period print"))),
    (Concept("bicycle", ("bike", "cycle"), ("a two-wheeler", "a velocipede"), ("ein Fahrrad", "une bicyclette")),
     Concept("charcoal sketch", ("charcoal drawing", "pencil sketch"), ("a graphite study", "drawn with coal"))),
)  # fmt: skip


@torch.no_grad()
def measure(encoder: ChunkEncoder) -> tuple[list[Result], dict[str, tuple[int, int]]]:
    """Gates of the words, and how many prompts that name no concept leave the gates nearly shut, ``(right, all)``."""
    results: list[Result] = []
    shut = {"name only": (0, 0), "further words": (0, 0)}
    for concepts in CONCEPTS:
        names = [[concept.name] for concept in concepts]
        gates = {
            "name only": token_gates(encoder, names),
            "further words": token_gates(encoder, [[c.name, *c.further] for c in concepts]),
        }
        pair = next((p for p in PAIRS if p.subject == concepts[0].name), None)
        if pair is not None:
            for key, each in gates.items():
                right, count = share(measure_pair("", encoder, pair, each), named=False)
                shut[key] = shut[key][0] + right, shut[key][1] + count
        for i, concept in enumerate(concepts):
            for kind, words in (("paraphrase", concept.others), ("translation", concept.translated)):
                for word in words:
                    alone, further = (
                        float(gate_values(each, encoder, word)[i] / gate_values(each, encoder, concept.name)[i])
                        for each in gates.values()
                    )
                    results.append(Result(concept.name, word, kind, round(alone, 3), round(further, 3)))
    return results, shut


def opened(results: Sequence[Result], kind: str) -> tuple[int, int, int]:
    """Number of words with a gate of at least 0.5: with the name alone, with further words, and of all words."""
    part = [result for result in results if result.kind == kind]
    return sum(r.alone >= 0.5 for r in part), sum(r.further >= 0.5 for r in part), len(part)
