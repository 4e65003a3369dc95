"""Examples: the sampled images, and the predictions that gates are to learn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.gates import GateSettings
from legomole.core.train import Images, TrainSettings, prompts_for
from legomole.core.train.examples import Examples, make_examples, target_gates
from legomole.core.train.prompts import Prompt

from ..merge.pools import close
from ..mole.mixtures import lora, merged, trained
from ..mole.models import Transformer, call
from .toy import ToyDenoiser

WORDS = [["ember"], ["heart"]]
PROMPTS = prompts_for(WORDS, ["ember", "heart", "ember heart", "a dog"])
SETTINGS = TrainSettings(examples=20, samples=9, batch=4, compose=1.2)
SAMPLED = SETTINGS.model_copy(update={"objective": "clip"})  # distillation samples no images


@dataclass
class Toy:
    model: Transformer
    experts: tuple[Adapter, Adapter]
    attachment: Attachment
    denoiser: ToyDenoiser

    def made(self, settings: TrainSettings = SETTINGS, **kw) -> Examples:
        return make_examples(self.attachment, self.denoiser, PROMPTS, settings, **kw)


@pytest.fixture(scope="module")
def toy() -> Iterator[Toy]:
    model = Transformer(1)
    experts = lora(model, 1), lora(model, 2)
    # the targets do not depend on the kind of gates
    with attach(model, trained(model, experts, GateSettings())) as attachment:
        yield Toy(model, experts, attachment, ToyDenoiser(model, PROMPTS))


def test_target_gates_by_hand():
    prompts = [Prompt("a", (0,)), Prompt("c", (2,)), Prompt("abc", (0, 1, 2)), Prompt("", ())]
    assert target_gates(prompts, 3, 1.5).tolist() == [[1, 0, 0], [0, 0, 1], [1.5, 1.5, 1.5], [0, 0, 0]]


def test_targets_are_the_merged_models_predictions(toy):
    made = toy.made()
    assert len(made) == 20
    assert made.noisy.shape == made.target.shape == (20, 5, 4)
    assert float(made.t.min()) >= 0.04
    assert float(made.t.max()) <= 1
    for i, p in enumerate(made.prompt.tolist()):
        g = [(1.2 if len(PROMPTS[p].named) > 1 else 1.0) * (j in PROMPTS[p].named) for j in range(2)]
        expected = call(merged(toy.model, toy.experts, g), made.noisy[i : i + 1], toy.denoiser.text[p : p + 1])
        assert close(made.target[i : i + 1], expected)


def test_noisy_latents_are_sampled_latents_with_noise(toy):
    """``(1 - t)`` times the sampled latents plus ``t`` times the noise."""
    sampled: list[torch.Tensor] = []
    sample = toy.denoiser.sample

    class Noting(ToyDenoiser):
        def sample(self, prompts, seed):
            sampled.append(sample(prompts, seed))
            return sampled[-1]

    noises: list[torch.Tensor] = []

    class Both(Noting):
        def noised(self, latents, t, noise):
            noises.append(noise)
            return super().noised(latents, t, noise)

    made = make_examples(toy.attachment, Both(toy.model, PROMPTS), PROMPTS, SAMPLED)
    latents = torch.cat(sampled)[torch.arange(20) % 9]
    t = made.t.view(-1, 1, 1)
    assert torch.allclose(made.noisy, (1 - t) * latents + t * torch.cat(noises), atol=1e-6)
    assert [len(part) for part in sampled] == [4, 4, 1]


def test_distillation_noises_zero_latents_and_samples_nothing(toy):
    class NoSampling(ToyDenoiser):
        def sample(self, prompts, seed):
            raise AssertionError

    reports: list[tuple[int, int, str]] = []
    denoiser = NoSampling(toy.model, PROMPTS)
    made = make_examples(toy.attachment, denoiser, PROMPTS, SETTINGS, progress=lambda *report: reports.append(report))
    assert reports == [(n, 20, "predicting") for n in (4, 8, 12, 16, 20)]
    noise = made.noisy / made.t.view(-1, 1, 1)  # standard normal
    assert noise.std() == pytest.approx(1, abs=0.15)
    assert noise.mean() == pytest.approx(0, abs=0.15)
    assert len({tuple(row.flatten().tolist()) for row in noise}) == 20


def test_every_prompt_is_used_and_the_same_seed_gives_the_same(toy):
    settings = SETTINGS.model_copy(update={"samples": 2 * len(PROMPTS), "examples": 2 * len(PROMPTS)})
    made, again = toy.made(settings), toy.made(settings)
    assert set(made.prompt.tolist()) == set(range(len(PROMPTS)))
    for name in ("noisy", "t", "prompt", "target"):
        assert torch.equal(getattr(made, name), getattr(again, name))
    assert not torch.equal(toy.made(settings.model_copy(update={"seed": 1})).noisy, made.noisy)


def test_images_of_a_user_and_sampled_images(toy):
    latents, prompt = torch.randn(3, 5, 4), [0, 1, 1]
    noises: list[torch.Tensor] = []

    class Noting(ToyDenoiser):
        def goal(self, latents, t, noise):
            noises.append(noise)
            return super().goal(latents, t, noise)

    made = make_examples(toy.attachment, Noting(toy.model, PROMPTS), PROMPTS, SAMPLED, images=Images(latents, prompt))
    noise = torch.cat(noises)
    for i in range(20):
        if i % 3 == 0:  # prompts without a concept, with the base model's predictions
            assert not PROMPTS[int(made.prompt[i])].named
            p = int(made.prompt[i])
            base = call(merged(toy.model, (), ()), made.noisy[i : i + 1], toy.denoiser.text[p : p + 1])
            assert close(made.target[i : i + 1], base)
        else:
            which = [j for j in range(20) if j % 3].index(i) % 3
            assert made.prompt[i] == prompt[which]
            assert torch.allclose(made.noisy[i], (1 - made.t[i]) * latents[which] + made.t[i] * noise[i], atol=1e-6)
            assert torch.allclose(made.target[i], noise[i] - latents[which], atol=1e-6)


def test_images_that_do_not_fit(toy):
    for images in (
        Images(torch.zeros(2, 5, 3), [0, 0]),
        Images(torch.zeros(2, 5, 4), [0]),
        Images(torch.zeros(2, 5, 4), [0, len(PROMPTS)]),
        Images(torch.zeros(2, 5, 4), [0, -1]),
    ):
        with pytest.raises(MergeError, match=r"images do not fit[\s\S]*\(5, 4\)"):
            toy.made(SAMPLED, images=images)


def test_images_that_are_not_finite(toy):
    class Broken(ToyDenoiser):
        def sample(self, prompts, seed):
            return super().sample(prompts, seed) / 0.0

    with pytest.raises(MergeError, match=r"not finite[\s\S]*strengths"):
        make_examples(toy.attachment, Broken(toy.model, PROMPTS), PROMPTS, SAMPLED)


def test_progress_and_cancelling(toy):
    reports: list[tuple[int, int, str]] = []
    toy.made(SAMPLED, progress=lambda *report: reports.append(report))
    assert reports[:3] == [(4, 29, "sampling"), (8, 29, "sampling"), (9, 29, "sampling")]
    assert reports[-1] == (29, 29, "predicting")

    def cancel(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        toy.made(progress=cancel)
    assert toy.attachment._gate_values.held_values is None


class TestFile:
    def test_round_trip(self, toy, tmp_path: Path):
        made, path = toy.made(), tmp_path / "examples.safetensors"
        assert Examples.load(path, "k") is None
        made.save(path, "k")
        read = Examples.load(path, "k")
        for name in ("noisy", "t", "prompt", "target"):
            assert torch.equal(getattr(read, name), getattr(made, name))

    def test_others_and_damaged_ones_are_made_again(self, toy, tmp_path: Path):
        path = tmp_path / "examples.safetensors"
        toy.made().save(path, "k")
        assert Examples.load(path, "other") is None
        path.write_bytes(path.read_bytes()[:-10])
        assert Examples.load(path, "k") is None
