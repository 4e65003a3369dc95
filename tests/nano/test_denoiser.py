"""The denoiser interface for training and calibration: a flow from clean latents to noise."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers")

from legomole.core.errors import MergeError
from legomole.core.train import fit_detector
from legomole.nano import words
from legomole.nano.denoiser import NanoDenoiser, NanoPromptEncoder
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


class TestPromptEncoder:
    def test_a_token_of_the_prompt_stands_at_its_position(self):
        encoder = NanoPromptEncoder(Prompts(any_words=True))
        row, ids = encoder.encode("a zebra in ember style"), encoder.token_ids("a zebra in ember style")
        assert dict(row.offsets) == {"clip": 0}
        assert row.mask is None
        assert row.states.shape == (len(ids["clip"]), 768) == (77, 768)
        assert ids["clip"][4] == words.IDS["ember"]
        assert list(ids["clip"][6:]) == [words.END] * 71
        other = encoder.encode("a zebra in neon style").states
        changed = (row.states - other).abs().amax(1) > 1e-3
        assert changed.nonzero()[0].item() == 4  # the first token that another word replaced

    def test_other_words_only_if_they_are_allowed(self):
        with pytest.raises(MergeError, match="zebra"):
            NanoPromptEncoder(Prompts()).encode("a zebra")
        with pytest.raises(MergeError, match="zebra"):
            NanoPromptEncoder(Prompts()).token_ids("a zebra")


TAGS = [
    "very detailed", "soft light", "sharp focus", "high quality", "award winning", "autumn", "oil", "wide", "glossy",
    "trending", "noon", "a lake behind it", "grain", "muted colors", "fog", "a red coat", "crowded", "two birds",
    "winter", "frame", "long shadows", "film still", "mist", "no people", "dust", "evening",
]  # fmt: skip


@pytest.fixture(scope="module")
def presence():
    """Presence of two concepts in a prompt."""
    encoder = NanoPromptEncoder(Prompts(any_words=True))
    fitted = fit_detector([["ember"], ["heart"]], encoder)
    assert fitted.notes == ()
    return lambda prompt: fitted.detector(encoder.encode(prompt).states[None])[0].tolist()


class TestDetector:
    """Concepts of the small model's LoRAs in prompts of its vocabulary and of any words."""

    @pytest.mark.parametrize("wording", words.WORDINGS + words.UNSEEN_WORDINGS)
    def test_every_wording(self, presence, wording):
        assert min(presence(words.prompt("heart", "ember", wording))) > 0.9
        assert presence(words.prompt("heart", "neon", wording)) == [
            pytest.approx(0, abs=0.3),
            pytest.approx(1, abs=0.1),
        ]
        assert presence(words.prompt("star", "ember", wording)) == [
            pytest.approx(1, abs=0.1),
            pytest.approx(0, abs=0.3),
        ]
        assert max(presence(words.prompt("star", "neon", wording))) < 0.3

    @pytest.mark.parametrize("tags", [4, 8, 16, 26])
    def test_tags_do_not_count(self, presence, tags):
        """The fault that gates which read the mean of the text have."""
        for prompt, named in (("a heart in ember style", [1, 1]), ("a star in neon style", [0, 0])):
            bare = presence(prompt)
            for text in (", ".join([prompt, *TAGS[:tags]]), ", ".join([*TAGS[:tags], prompt])):
                for value, alone, is_named in zip(presence(text), bare, named, strict=True):
                    assert value > 0.9 * alone if is_named else value < 0.3
