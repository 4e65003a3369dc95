"""The denoiser interface for training and calibration: a flow from clean latents to noise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from legomole.nano.denoiser import NanoDenoiser
from legomole.nano.model import Prompts
from legomole.nano.sampling import sample

TEXTS = ["a heart in ember style", "a star in neon style"]


@pytest.fixture(scope="module")
def denoiser(store):
    return NanoDenoiser(store.transformer, TEXTS, Prompts())


def test_a_perfect_prediction_gives_the_clean_latents(denoiser):
    clean, noise = (torch.randn(3, 16, 8, 8, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    t = torch.tensor([0.0, 0.3, 1.0])
    noisy = denoiser.noised(clean, t, noise)
    assert torch.equal(noisy[0], clean[0])
    assert torch.equal(noisy[2], noise[2])
    torch.testing.assert_close(noisy[1], 0.7 * clean[1] + 0.3 * noise[1])
    torch.testing.assert_close(denoiser.clean(noisy, t, denoiser.goal(clean, t, noise)), clean)


def test_predictions_are_the_transformers(denoiser, store):
    x = torch.randn(2, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    hidden, pooled = denoiser.prompts([TEXTS[1], TEXTS[0]])
    expected = store.transformer(
        hidden_states=x, timestep=torch.tensor([250.0, 900.0]), encoder_hidden_states=hidden,
        pooled_projections=pooled,
    ).sample  # fmt: skip
    torch.testing.assert_close(denoiser.predict(x, torch.tensor([0.25, 0.9]), [1, 0]), expected)


def test_it_samples_without_guidance(denoiser, store):
    expected = sample(store.transformer, denoiser.prompts, [TEXTS[1], TEXTS[1]], 4, guidance=1.0)
    assert torch.equal(denoiser.sample([1, 1], 4), expected)
