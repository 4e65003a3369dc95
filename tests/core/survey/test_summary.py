"""Sentences for adapters of known overlap, size and rank."""

from __future__ import annotations

import pytest
from legomole.core.survey.summary import _percent, summary_lines
from legomole.core.survey.survey import survey

from .test_survey import adapter, layers, part


def summary_of(*adapters, **kw) -> list[str]:
    return summary_lines(survey(adapters, **kw))


def test_two_that_work_against_each_other_in_the_middle_blocks():
    """Products: 1 in block 0 (cosine 0), 16 in block 1 (cosine -1), 1 in block 2 (0): -16 / 18 overall."""
    a = adapter("a", layers(part((1, 0, 0)), part((4, 1, 1)), part((1, 0, 0))))
    b = adapter("b", layers(part((1, 1, 1)), part((-4, 1, 1)), part((1, 2, 2))))
    text = summary_of(a, b)
    assert text[0] == "a and b work against each other (cosine -0.89) in the middle blocks (-1.00)."
    assert text[1] == "a acts mostly in the middle blocks (89% of its energy)."
    assert text[2] == "b acts mostly in the middle blocks (89% of its energy)."
    # the sum: squares 1, 1 and 1, 1 in blocks 0 and 2, nothing in block 1
    assert text[3] == "It takes rank 2 to keep 95% of the sum's energy, and that keeps all of it."


def test_a_section_that_differs_from_the_whole_is_named():
    """Products 20 x 20 with cosine 0, 1 with cosine -1, 1 with 0."""
    a = adapter("a", layers(part((20, 0, 0)), part((1, 1, 1)), part((1, 0, 0))))
    b = adapter("b", layers(part((20, 1, 1)), part((-1, 1, 1)), part((1, 2, 2))))
    assert summary_of(a, b)[0] == (
        "a and b hardly touch each other (cosine 0.00), but they work against each other in the middle blocks (-1.00)."
    )


def test_sections_that_differ_in_both_directions():
    """Products 1, 1, 1 with cosines 1, -1, 0; then 4, 1, 1: 3 / 6 = 0.5 over all."""
    a, b = (adapter(n, layers(part((1, 0, 0)), part((s, 1, 1)), part((1, 0, s % 5)))) for n, s in (("a", 1), ("b", -1)))
    assert summary_of(a, b)[0] == (
        "a and b hardly touch each other (cosine 0.00), but they work against each other in the middle blocks (-1.00) "
        "and share a direction in the first blocks (+1.00)."
    )
    a, b = (adapter(n, layers(part((2, 0, 0)), part((s, 1, 1)), part((1, 0, s % 5)))) for n, s in (("a", 1), ("b", -1)))
    assert summary_of(a, b)[0] == (
        "a and b share a direction (cosine +0.50) in the first blocks (+1.00), but they work against each other in the "
        "middle blocks (-1.00)."
    )


def test_one_lora_twice_and_one_much_larger():
    a = adapter("a", layers(part((3, 0, 0), (1, 1, 1))))
    text = summary_of(a, adapter("b", dict(a.modules)), weights=[1, 3])
    assert text[0] == "a and b are nearly the same LoRA (cosine +1.00)."
    assert text[1] == "b is 3.0 times as large as a, at these weights."
    # (4 x 3)^2 and 4^2: 90% at rank 1
    assert text[2] == "It takes rank 2 to keep 95% of the sum's energy, and that keeps all of it."
    # clusters 9 e1, and 3 e1 with e2 and 3 e2: best rank one of the latter's sum is 4 e2, lost are 9 of 160
    assert text[3] == ("LEGO at rank 1 to 2 keeps 94%; 67% of its units blend several LoRAs, the others come from one.")


def test_one_alone():
    alone = adapter("a", layers(part((9, 0, 0), (2, 1, 1), (1, 2, 2))))
    assert summary_of(alone) == ["Rank 2 keeps 99% of its energy; all of it needs rank 3."]  # 85 of 86


def test_many_that_do_not_overlap_share_a_sentence():
    several = [adapter(name, layers(part((1, i, i)))) for i, name in enumerate("abcd")]
    assert summary_of(*several)[0].startswith("The 4 LoRAs hardly touch each other: every cosine is within 0.00 of 0")
    several[3] = adapter("e", dict(several[0].modules))
    text = summary_of(*several)
    assert text[0] == "a and e are nearly the same LoRA (cosine +1.00)."
    assert text[3] == "The other 3 pairs overlap less."


def test_a_little():
    """Products 9 x 9; 3 times 3 of it in common: 9 / 81 = 0.11."""
    a = adapter("a", layers(part((3, 0, 0), (72**0.5, 1, 1))))
    for sign, text in (
        (1, "overlap a little (cosine +0.11)"),
        (-1, "work against each other a little (cosine -0.11)"),
    ):
        assert summary_of(a, adapter("b", layers(part((sign * 3, 0, 0), (72**0.5, 2, 2)))))[0] == f"a and b {text}."


def test_many_in_one_section_and_long_names():
    several = [
        adapter(f"{'long' * 20}_{i}", layers(part((9, i, i)), part((1, 0, 0)), part((1, 0, 0)))) for i in range(4)
    ]
    text = summary_of(*several)
    assert "4 of the 4 LoRAs act mostly in the first blocks." in text
    assert "longlonglonglonglong..nglo" in " ".join(summary_of(several[0], several[1]))


def test_less_than_all_is_never_100_percent():
    assert [_percent(share) for share in (0.5, 0.994, 0.9951, 0.99996, 1.0)] == ["50%", "99%", "99.5%", "99.9%", "100%"]


def test_a_lora_of_zeros():
    zero = adapter("z", {name: p for name, p in layers(part((1, 0, 0))).items() if ".b." in name})
    assert "z changes nothing." in summary_of(adapter("a", layers(part((1, 0, 0)))), zero)
    assert summary_of(zero)[0] == "z changes nothing."


@pytest.mark.parametrize("weight", [1e-30, 1e30])
def test_extreme_weights(weight):
    a = adapter("a", layers(part((3, 0, 0), (1, 1, 1))))
    assert summary_of(a, adapter("b", layers(part((3, 2, 2)))), weights=[1, weight])
