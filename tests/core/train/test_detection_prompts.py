"""Prompts that concept detectors are fitted on: every kind is there, and near misses are no hits."""

from __future__ import annotations

import pytest
from legomole.core.mole.router import concept_patterns, concepts_in
from legomole.core.train.detection_prompts import detection_prompts

CONCEPTS = [["ember style", "burning"], ["heart"], ["C++ (logo)"]]


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    return detection_prompts(CONCEPTS)


def test_they_depend_on_the_seed_only(prompts: list[str]):
    assert detection_prompts(CONCEPTS) == prompts
    assert detection_prompts(CONCEPTS, seed=1) != prompts


def test_every_prompt_is_there_once_and_the_last_one_is_empty(prompts: list[str]):
    assert len(set(prompts)) == len(prompts)
    assert prompts[-1] == ""
    assert 80 <= len(prompts) <= 120  # about 36 + 24 * 3


def test_every_concept_is_named_alone_and_with_another_one_and_many_prompts_name_none(prompts: list[str]):
    named = concepts_in(prompts, CONCEPTS)
    alone = named[named.sum(1) == 1].sum(0)
    assert alone.tolist() == [20, 20, 20]
    assert int((named.sum(1) == 2).sum()) == 12
    assert int(named.sum(1).max()) == 2
    assert int((named.sum(1) == 0).sum()) >= 25


def test_of_a_single_concept_there_are_no_pairs():
    assert int(concepts_in(detection_prompts([["heart"]]), [["heart"]]).sum()) == 20


@pytest.mark.parametrize("number", range(3))
def test_a_concept_stands_at_the_first_a_middle_and_the_last_position(prompts: list[str], number: int):
    patterns = concept_patterns(CONCEPTS[number])
    places: set[str] = set()
    for prompt in prompts:
        for pattern in patterns:
            for match in pattern.finditer(prompt):
                before, after = prompt[: match.start()].split(), prompt[match.end() :].split()
                places |= {"first"} if not before else {"last"} if not after else set()
                places |= {"alone"} if not before and not after else set()
                places |= {"middle"} if len(before) > 8 and len(after) > 8 else set()
                places |= {"many tags behind"} if len(after) > 25 else set()
                places |= {"a sentence before"} if ". " in prompt[: match.start()] else set()
    assert places == {"first", "last", "alone", "middle", "many tags behind", "a sentence before"}


def test_every_word_is_used_however_many_there_are():
    words = [f"word{chr(97 + i)}" for i in range(26)]
    for i in range(26):
        assert concepts_in(detection_prompts([words]), [[words[i]]]).any()


def test_near_misses_share_a_part_with_a_concept_but_do_not_name_it(prompts: list[str]):
    named = concepts_in(prompts, CONCEPTS)
    misses = [prompt for prompt, row in zip(prompts, named, strict=True) if not row.any()]
    parts = {part.strip() for prompt in misses for part in prompt.split(",")}
    assert {"heartbeat", "hearty", "unheart"} <= parts
    for word in ("style", "ember", "C++"):  # of a phrase, before and behind other words
        assert any(part.startswith(f"{word} ") for part in parts)
        assert any(part.endswith(f" {word}") for part in parts)
    assert not {"heart", "ember style", "burning"} & parts
