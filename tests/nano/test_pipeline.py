"""The diffusers pipeline of the small model against `sampling.sample`."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from legomole.core.formats import load
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.nano import sampling
from legomole.nano.model import Prompts
from legomole.nano.pipeline import pipeline
from legomole.nano.store import Store

# warnings inside the libraries
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:Already found a `peft_config`:UserWarning"
)

TEXTS = ["a heart in ember style", "a star in neon style"]


@pytest.fixture
def pipe(store: Store) -> Any:
    made = pipeline(Store(store.folder))
    made.set_progress_bar_config(disable=True)
    return made


def sampled(pipe: Any, texts: Any = TEXTS, seed: int = 3, **options: Any) -> torch.Tensor:
    settings = {"height": 64, "width": 64, "num_inference_steps": 12, "guidance_scale": 3.0, "output_type": "latent",
                "sigmas": sampling.times()}  # fmt: skip
    count = len(texts) * options.get("num_images_per_prompt", 1)
    return pipe(texts, latents=sampling.noise(count, seed), **{**settings, **options}).images


def expected(store: Store, texts: list[str] = TEXTS, seed: int = 3, **options: Any) -> torch.Tensor:
    return sampling.sample(store.transformer, Prompts(), texts, seed, **options)


def like(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(b.abs().max()))


def test_it_samples_what_sampling_samples(store, pipe):
    like(sampled(pipe), expected(store))
    like(sampled(pipe, guidance_scale=1.0), expected(store, guidance=1.0))
    like(sampled(pipe, num_images_per_prompt=2), expected(store, [TEXTS[0], TEXTS[0], TEXTS[1], TEXTS[1]]))


def test_pictures_come_from_the_decoder(store, pipe):
    pictures = sampled(pipe, output_type="pt")
    torch.testing.assert_close(pictures, (store.pictures(expected(store)) + 1) / 2, rtol=0, atol=1e-3)
    image = sampled(pipe, output_type="pil")[0]
    assert image.size == (64, 64)


def test_a_negative_prompt_replaces_the_empty_one(store, pipe):
    other = "a moon in night style"
    like(sampled(pipe, negative_prompt=["", ""]), expected(store))
    first, second = sampled(pipe, TEXTS, negative_prompt=[other, ""])
    like(second, expected(store)[1])
    assert (first - expected(store)[0]).abs().max() > 0.01
    like(first, sampled(pipe, [TEXTS[0], other], negative_prompt=other)[0])


def test_loras_load_as_in_any_pipeline(store, pipe):
    pipe.load_lora_weights(store.lora("heart"), adapter_name="heart")
    pipe.load_lora_weights(store.lora("ember"), adapter_name="ember")
    pipe.set_adapters(["heart", "ember"], [1.0, 0.5])
    mixture = Mixture(tuple(load(store.lora(c)) for c in ("heart", "ember")), strengths=(1.0, 0.5))
    plain = expected(store)
    with attach(store.transformer, mixture):
        mixed = expected(store)
    assert (mixed - plain).abs().max() > 0.05 * plain.abs().max()
    like(sampled(pipe), mixed)
