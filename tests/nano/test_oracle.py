"""Shapes and judgements of the judge."""

from __future__ import annotations

import torch
from legomole.nano.oracle import Oracle, judge
from legomole.nano.words import STYLES, SUBJECTS


def test_classes_are_the_concepts_and_none_of_these(seeded):
    oracle = Oracle().eval()
    subject, style = oracle(torch.rand(2, 3, 64, 64))
    assert subject.shape == (2, len(SUBJECTS) + 1)
    assert style.shape == (2, len(STYLES) + 1)
    assert oracle.features(torch.rand(2, 3, 64, 64)).shape == (2, 512)


def test_pictures_are_judged_one_by_one(seeded):
    oracle = Oracle().eval()
    pictures = torch.rand(4, 3, 64, 64)
    with torch.no_grad():
        for head, row in ((oracle.subject, SUBJECTS.index("heart")), (oracle.style, len(STYLES))):
            head.weight.zero_()
            head.bias.zero_()
            head.bias[row] = 1.0  # predicts a heart for every picture, and no style
        features = oracle.features(pictures)
        middle = features.mean(0)
        toward = (features - middle)[1]
        oracle.style.weight[STYLES.index("ember")] = 2 * toward / (toward @ toward)  # except ember for the second
        oracle.style.bias[STYLES.index("ember")] = -2 * (middle @ toward) / (toward @ toward)
    verdict = judge(oracle, pictures, [("heart", "ember"), ("heart", "ember"), ("fish", "ember"), ("star", "neon")])
    assert verdict.subject.tolist() == [True, True, False, False]
    assert verdict.style.tolist() == [False, True, False, False]
    assert verdict.both.tolist() == [False, True, False, False]
    torch.testing.assert_close(verdict.features, features)
    assert not verdict.features.requires_grad
