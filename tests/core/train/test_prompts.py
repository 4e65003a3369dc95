"""Training prompts: every kind is present, and no word names two LoRAs."""

from __future__ import annotations

import pytest
from legomole.core.errors import MergeError
from legomole.core.train.prompts import BASE, EMPTY, JOINT, SINGLE, Prompt, prompts_for, sampling_weights

WORDS = [["ember style", "embers"], ["heart"]]


def kinds(prompts: list[Prompt]) -> set[tuple[int, ...]]:
    return {prompt.named for prompt in prompts}


def test_made_up_from_the_words_alone():
    prompts = prompts_for(WORDS)
    assert kinds(prompts) == {(0,), (1,), (0, 1), ()}
    texts = [prompt.text for prompt in prompts]
    assert len(set(texts)) == len(texts)
    assert texts[-1] == ""
    assert {"ember style", "a picture of embers", "heart", "ember style, heart", "a photo of a dog"} <= set(texts)
    assert prompts_for(WORDS) == prompts


def test_every_two_and_all_of_three():
    named = kinds(prompts_for([["a1"], ["b1"], ["c1"]]))
    assert named == {(0,), (1,), (2,), (0, 1), (0, 2), (1, 2), (0, 1, 2), ()}


def test_one_lora():
    assert kinds(prompts_for([["heart"]])) == {(0,), ()}


def test_the_users_prompts_come_first_and_only_missing_kinds_are_added():
    prompts = prompts_for(WORDS, ["A HEART on fire", " embers and a heart ", "A HEART on fire", "", "ember style"])
    assert prompts[:3] == [
        Prompt("A HEART on fire", (1,)),
        Prompt("embers and a heart", (0, 1)),
        Prompt("ember style", (0,)),
    ]
    assert {prompt.named for prompt in prompts[3:]} == {()}  # base prompts and the empty one
    assert prompts[-1] == Prompt("", ())


def test_prompts_of_all_kinds_are_enough():
    given = ["ember style", "heart", "heart, ember style", "a dog"]
    assert [prompt.text for prompt in prompts_for(WORDS, given)] == [*given, ""]


def test_base_prompts_name_no_concept():
    for prompt in prompts_for([["dog", "car"], ["a bowl of fruit"]]):
        if not prompt.named:
            assert not {"dog", "car"} & set(prompt.text.split())
            assert prompt.text != "a bowl of fruit"


def test_bad_input():
    with pytest.raises(MergeError, match=r"LoRA number 2 has no words[\s\S]*trigger words"):
        prompts_for([["a"], ["", "  "]])
    with pytest.raises(MergeError, match=r"number 1 and 3 are named by the same word[\s\S]*'Heart'"):
        prompts_for([["heart"], ["b"], ["c", "Heart"]])
    with pytest.raises(
        MergeError, match=r"None of the prompts names LoRA number 1[\s\S]*'ember style' or 'embers'[\s\S]*'a heart'"
    ):
        prompts_for(WORDS, ["a heart"])
    prompts_for([["heart", "heart"], ["b"]])  # a word twice for one LoRA is allowed


def test_sampling_weights_by_hand():
    prompts = [
        Prompt("a", (0,)),
        Prompt("a2", (0,)),
        Prompt("b", (1,)),
        Prompt("ab", (0, 1)),
        Prompt("x", ()),
        Prompt("", ()),
    ]
    # single: .4 over two LoRAs, LoRA 0's over two prompts
    assert sampling_weights(prompts) == pytest.approx([SINGLE / 4, SINGLE / 4, SINGLE / 2, JOINT, BASE, EMPTY])
    assert sum((JOINT, SINGLE, BASE, EMPTY)) == pytest.approx(1)
    # without a kind, the others share its examples
    assert sampling_weights(prompts[:3]) == pytest.approx([0.25, 0.25, 0.5])
