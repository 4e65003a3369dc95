"""Objectives of gate training, by hand."""

from __future__ import annotations

import pytest
import torch
from legomole.core.train.examples import Examples
from legomole.core.train.objectives import ClipGuidance, Regression
from legomole.core.train.prompts import Prompt

PROMPTS = [Prompt("", ()), Prompt("ember", (0,)), Prompt("ember heart", (0, 1))]
CONCEPTS = [["ember", "embers"], ["heart"]]


def examples(*prompts: int) -> Examples:
    n = len(prompts)
    noisy = torch.arange(n * 2.0).view(n, 2)
    return Examples(noisy, torch.linspace(0.25, 0.75, n), torch.tensor(prompts), torch.zeros(n, 2))


class Doubling:
    """Predicts twice its input; the clean latents are the input minus ``t`` times the prediction."""

    def __init__(self) -> None:
        self.asked: list[list[int]] = []

    def predict(self, noisy, t, prompts):
        self.asked.append(prompts)
        return 2 * noisy

    def clean(self, noisy, t, prediction):
        return noisy - t[:, None] * prediction


class TestRegression:
    def test_mean_squared_error(self):
        # rows (0, 1) and (4, 5), predictions (0, 2) and (8, 10), targets 0: (0 + 4 + 64 + 100) / 4
        denoiser = Doubling()
        objective = Regression(denoiser, examples(2, 0, 1))
        assert objective.size == 3
        assert float(objective.loss([0, 2])) == 42.0
        assert denoiser.asked == [[2, 1]]

    def test_half_precision_predictions_are_compared_in_float32(self):
        class Half(Doubling):
            def predict(self, noisy, t, prompts):
                return super().predict(noisy, t, prompts).half()

        loss = Regression(Half(), examples(2, 0, 1)).loss([0, 2])
        assert loss.dtype == torch.float32
        assert float(loss) == 42.0


class ToyClip:
    """Embeds latents as their direction, and texts as fixed directions."""

    def images(self, latents):
        return torch.nn.functional.normalize(latents, dim=-1)

    def texts(self, texts):
        directions = {"ember": (1.0, 0.0), "heart": (0.0, 1.0), "ember heart": (0.6, 0.8)}
        return torch.tensor([directions[text] for text in texts])


class TestGuidance:
    def test_global_and_local_by_hand(self):
        # example 0 names no concept and is left out
        e = Examples(
            torch.tensor([[9.0, 9.0], [3.0, 4.0], [0.0, 2.0]]),
            torch.tensor([0.25, 0.25, 0.25]),  # clean = noisy / 2
            torch.tensor([0, 2, 1]),
            torch.zeros(3, 2),
        )
        objective = ClipGuidance(Doubling(), e, PROMPTS, CONCEPTS, ToyClip())
        assert objective.size == 2
        # first: image (.6, .8). Prompt "ember heart": cos 1. Local: 1 - .6 and 1 - .8, mean .3
        assert float(objective.loss([0])) == pytest.approx(0.3)
        # second: image (0, 1). Prompt "ember": cos 0, global 1. Local: 1
        assert float(objective.loss([1])) == pytest.approx(2.0)
        assert float(objective.loss([0, 1])) == pytest.approx((0.3 + 2.0) / 2)

    def test_gradients_reach_the_prediction(self):
        e, scale = examples(2), torch.tensor(2.0, requires_grad=True)

        class Scaled(Doubling):
            def predict(self, noisy, t, prompts):
                return scale * (noisy + torch.tensor([1.0, 0.0]))

        ClipGuidance(Scaled(), e, PROMPTS, CONCEPTS, ToyClip()).loss([0]).backward()
        assert scale.grad is not None
        assert float(scale.grad.abs()) > 0
