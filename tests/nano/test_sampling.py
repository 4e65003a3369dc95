"""Euler steps along the flow, with formulas in place of the transformer, so that the result is known."""

from __future__ import annotations

import pytest
import torch
from legomole.nano import sampling
from legomole.nano.model import Prompts


def test_times_and_levels_by_hand():
    assert sampling.times(4) == [1.0, 0.75, 0.5, 0.25]
    assert sampling.times(3) == pytest.approx([1.0, 0.667, 0.334])  # counted in whole thousandths
    # 3 t / (1 + 2 t)
    torch.testing.assert_close(sampling.sigmas(4), torch.tensor([1.0, 0.9, 0.75, 0.5, 0.0]))
    torch.testing.assert_close(sampling.sigmas(2, shift=1.0), torch.tensor([1.0, 0.5, 0.0]))
    assert len(sampling.sigmas()) == 13


class Straight:
    """Predicts a constant flow: -1 for the prompt "a star", +1 for any other."""

    def __init__(self, prompts: Prompts) -> None:
        self.star = prompts(["a star"])[1][0]
        self.calls: list[tuple[int, float]] = []

    def __call__(self, *, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        self.calls.append((len(hidden_states), float(timestep[0])))
        rows = [1.0 if torch.equal(row, self.star) else -1.0 for row in pooled_projections]
        assert encoder_hidden_states.shape[1:] == (77, 768)
        return (-torch.tensor(rows)[:, None, None, None].expand_as(hidden_states),)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    pytest.importorskip("transformers")
    return Prompts()


def test_guidance_by_hand(prompts):
    # the flow is -1 for the prompt and +1 without it: with guidance g it is 1 - 2 g, and x ends at noise - flow
    x = sampling.sample(Straight(prompts), prompts, ["a star"], 0, guidance=3.0)
    torch.testing.assert_close(x, sampling.noise(1, 0) + 5.0)
    x = sampling.sample(Straight(prompts), prompts, ["a star"], 0, guidance=1.0)
    torch.testing.assert_close(x, sampling.noise(1, 0) + 1.0)


def test_the_noise_of_a_prompt_does_not_depend_on_the_batch(prompts):
    model = Straight(prompts)
    texts = ["a star", "", "a star"]
    x = sampling.sample(model, prompts, texts, 5, steps=2, batch=2, guidance=1.0)
    assert model.calls == [(4, 1000.0), (4, 750.0), (2, 1000.0), (2, 750.0)]
    torch.testing.assert_close(x, sampling.noise(3, 5) + torch.tensor([1.0, -1.0, 1.0])[:, None, None, None])


def test_the_seed_determines_the_result(store, prompts):
    texts = ["a heart in ember style", "a star in neon style"]
    first, again, other = (sampling.sample(store.transformer, prompts, texts, seed, steps=3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
