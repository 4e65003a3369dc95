"""Ways to combine LoRAs: those of the nano benchmark, and K-LoRA."""

from __future__ import annotations

from legomole.core.formats import load

from ..nano import methods as nano
from ..nano.methods import LoraSet, Method, World
from . import words
from .klora import k_lora
from .model import ArtStore
from .text import ArtPromptEncoder, ArtPrompts

WORLD = World(
    words.BASE_SUBJECTS[::8], words.BASE_STYLES, words.NEW_SUBJECTS, words.WORDINGS, words.caption,
    lambda: ArtPromptEncoder(ArtPrompts()),
)  # fmt: skip

METHODS: dict[str, Method] = {**nano.METHODS, "k-lora": Method(k_lora, "-")}


def load_set(store: ArtStore, prompts: ArtPrompts, pair: tuple[str, str], *, wide: bool = False) -> LoraSet:
    """Load two LoRAs, for square pictures or for `wide` ones."""
    adapters = tuple(load(store.lora(concept, 0)) for concept in pair)
    return LoraSet(adapters, 0, store.wide if wide else store.transformer, prompts, pair, WORLD)
