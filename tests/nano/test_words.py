"""Vocabulary, token ids and wordings. Oracle: CLIP's vocabulary and tokenizer, if a ComfyUI has them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
from legomole.core.errors import MergeError
from legomole.nano import words

from ..comfy import server


@pytest.fixture(scope="module")
def vocabulary() -> Path:
    """Folder with CLIP's vocabulary."""
    found = server.find()
    if isinstance(found, str):
        pytest.skip(found)
    return found[0] / "comfy" / "sd1_tokenizer"


def test_tokens_of_a_prompt():
    found = words.tokens("A heart, drawn in ember style.")
    assert found[:10] == [49406, 320, 1936, 267, 8893, 530, 47049, 1844, 269, 49407]
    assert found[10:] == [49407] * 67
    assert words.tokens("") == [49406, *[49407] * 76]


def test_token_ids_are_those_of_clip(vocabulary):
    known = json.loads((vocabulary / "vocab.json").read_text(encoding="utf-8"))
    assert {word: known[f"{word}</w>"] for word in words.IDS} == words.IDS


def test_prompts_are_tokenized_as_clip_does(vocabulary):
    transformers: Any = pytest.importorskip("transformers")
    clip = transformers.CLIPTokenizer.from_pretrained(vocabulary)
    for wording in (*words.WORDINGS, *words.UNSEEN_WORDINGS):
        for pair in (("heart", "ember"), ("arrow", "checker"), ("mushroom", "blueprint")):
            text = words.prompt(*pair, wording)
            assert words.tokens(text) == clip(text, padding="max_length", max_length=77).input_ids


@pytest.mark.parametrize(
    ("pair", "wording", "expected"),
    [
        (("heart", "neon"), "a {s} in {k} style", "a heart in neon style"),
        (("arrow", "ember"), "a {s} in {k} style", "an arrow in ember style"),
        (("arrow", "ember"), "a {k} picture of a {s}", "an ember picture of an arrow"),
        (("heart", "ember"), "a simple {s} with a {k} look", "a simple heart with an ember look"),
    ],
)
def test_an_stands_before_vowels(pair, wording, expected):
    assert words.prompt(*pair, wording) == expected


def test_every_prompt_can_be_tokenized():
    for wording in (*words.WORDINGS, *words.UNSEEN_WORDINGS):
        for subject in words.SUBJECTS:
            for style in words.STYLES:
                assert {words.IDS[subject], words.IDS[style]} < set(words.tokens(words.prompt(subject, style, wording)))


def test_synonyms_are_distinct_words():
    others = [word for group in words.SYNONYMS.values() for word in group]
    assert len({*others, *words.SUBJECTS, *words.STYLES}) == len(others) + 16 + 12
    assert set(words.SYNONYMS) < {*words.SUBJECTS, *words.STYLES}


def test_unknown_words_are_named():
    with pytest.raises(MergeError, match="circle, square") as error:
        words.tokens("a zebra in velvet style")
    assert "zebra, velvet" in str(error.value)


def test_75_words_fit_and_76_do_not():
    assert words.tokens("a " * 75)[-2:] == [320, 49407]
    with pytest.raises(MergeError, match=re.compile("too long.*75.*76", re.DOTALL)):
        words.tokens("a " * 76)


class TestAnyWords:
    def test_known_words_keep_their_tokens(self):
        for text in ("A heart, drawn in ember style.", ""):
            assert words.tokens(text, any_words=True) == words.tokens(text)

    def test_unknown_words_get_tokens_that_stand_for_no_known_word(self):
        names = [f"word{i}" for i in range(2000)]
        found = [words.tokens(name, any_words=True)[1] for name in names]
        assert all(512 <= token < words.START for token in found)
        assert not set(found) & set(words.IDS.values())
        assert len(set(found)) > 0.95 * len(names)  # of 48894

    def test_a_token_depends_on_the_letters_only(self):
        one, other = words.tokens("a zebra", any_words=True), words.tokens("the Zebra, in velvet", any_words=True)
        assert one[2] == other[2]
        assert other[5] != other[2]
        # its checksum, folded into 512 .. 49405
        assert one[2] == 512 + crc32(b"zebra") % 48894

    def test_a_token_of_a_known_word_is_passed_over(self, monkeypatch):
        taken = words.tokens("zebra", any_words=True)[1]
        monkeypatch.setattr(words, "_KNOWN_IDS", frozenset({taken, taken + 1}))
        assert words.tokens("zebra", any_words=True)[1] == taken + 2

    def test_what_does_not_fit_is_left_out(self):
        found = words.tokens("zebra " * 75 + "heart", any_words=True)
        assert len(found) == words.LENGTH
        assert words.IDS["heart"] not in found
        assert found[-1] == words.END
