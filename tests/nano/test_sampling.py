"""Steps of the flow. The transformers here are formulas, so that the end is known."""

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
    """Leads from any noise to `goal`, as long as what is said of the prompt is `asked`; the empty one to minus that."""

    def __init__(self, prompts: Prompts) -> None:
        self.asked, self.plain = (prompts([text])[1][0] for text in ("a star", ""))
        self.seen: list[tuple[int, float]] = []

    def __call__(self, *, hidden_states, timestep, encoder_hidden_states, pooled_projections, return_dict):
        self.seen.append((len(hidden_states), float(timestep[0])))
        rows = [1.0 if torch.equal(row, self.asked) else -1.0 for row in pooled_projections]
        assert encoder_hidden_states.shape[1:] == (77, 768)
        return (-torch.tensor(rows)[:, None, None, None].expand_as(hidden_states),)


@pytest.fixture(scope="module")
def prompts() -> Prompts:
    pytest.importorskip("transformers")
    return Prompts()


def test_guidance_by_hand(prompts):
    # the flow is -1 as asked and +1 without: guided by g it is 1 - 2 g, and x goes from noise to noise - flow
    x = sampling.sample(Straight(prompts), prompts, ["a star"], 0, guidance=3.0)
    torch.testing.assert_close(x, sampling.noise(1, 0) + 5.0)
    x = sampling.sample(Straight(prompts), prompts, ["a star"], 0, guidance=1.0)
    torch.testing.assert_close(x, sampling.noise(1, 0) + 1.0)


def test_every_prompt_has_its_noise_whatever_the_batch(prompts):
    model = Straight(prompts)
    texts = ["a star", "", "a star"]
    x = sampling.sample(model, prompts, texts, 5, steps=2, batch=2, guidance=1.0)
    assert model.seen == [(4, 1000.0), (4, 750.0), (2, 1000.0), (2, 750.0)]
    torch.testing.assert_close(x, sampling.noise(3, 5) + torch.tensor([1.0, -1.0, 1.0])[:, None, None, None])


def test_the_seed_alone_decides(store, prompts):
    texts = ["a heart in ember style", "a star in neon style"]
    first, again, other = (sampling.sample(store.transformer, prompts, texts, seed, steps=3) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not first.requires_grad
