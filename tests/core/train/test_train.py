"""train(): gates from prompts, with every objective; interruptions; errors."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from legomole.core.errors import FormatError, MergeError
from legomole.core.formats.files import read_tensors
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.trained import TrainedGates
from legomole.core.train import Images, TrainingResult, TrainSettings, prompts_for, train

from ..merge.pools import close
from ..mole.mixtures import Values, lora
from ..mole.models import FEATURES, Transformer
from .toy import ToyDenoiser, word_detector

WORDS = [["ember"], ["heart"]]
PROMPTS = prompts_for(WORDS, ["ember", "heart", "ember heart", "a dog"])
SETTINGS = TrainSettings(steps=20, batch=16, examples=48, samples=16, warmup=2, learning_rate=0.05)


class Stop(Exception):
    pass


class ToyClip:
    """Embeds latents as their mean, and texts as a direction computed from their letters."""

    def images(self, latents):
        return torch.nn.functional.normalize(latents.mean(1), dim=-1)

    def texts(self, texts):
        rows = [torch.tensor([float(ord(letter)) for letter in (text + "....")[:4]]) - 105 for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows), dim=-1)


def mixture(model, strengths=(), n: int = 2, mixing="delta", **settings) -> Mixture:
    chosen = GateSettings(**settings)
    detector = word_detector().select(range(n)) if chosen.reads == "text" else None
    gates = GateSet(n, chosen, detector=detector)
    return Mixture(tuple(lora(model, 1 + i) for i in range(n)), gates, strengths, mixing=mixing)


def run(model, mixed: Mixture, settings: TrainSettings = SETTINGS, *, concepts=WORDS, **kw) -> TrainingResult:
    with attach(model, mixed) as at:
        return train(at, mixed, ToyDenoiser(model, PROMPTS), PROMPTS, concepts, settings, **kw)


def equal(one: GateSet, other: GateSet) -> bool:
    a, b = one.state_dict(), other.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class TestObjectives:
    # gates with a detector start where the router ends, near the goal
    @pytest.mark.parametrize(("reads", "left"), [("text", 0.5), ("text-mean", 0.1)])
    def test_distilled_text_gates_open_for_the_words(self, reads, left):
        """After training, gates are open for the LoRAs a prompt names and closed for the others."""
        model = Transformer(1)
        weights = copy.deepcopy(model.state_dict())
        mixed = mixture(model, granularity="network", reads=reads)
        done = run(model, mixed, SETTINGS.model_copy(update={"steps": 80, "learning_rate": 0.1}))
        assert done.fit.losses[-1] < left * done.fit.losses[0]
        observed = Values()
        denoiser = ToyDenoiser(model, PROMPTS)
        with torch.no_grad(), attach(model, Mixture(mixed.experts, done.gates.gates)) as at, at.watch(observed):
            denoiser.predict(torch.randn(4, 5, 4), torch.ones(4), [0, 1, 2, 3])
        wanted = torch.tensor([[1.0, 0], [0, 1], [1.2, 1.2], [0, 0]])
        assert torch.allclose(observed.values[""], wanted, atol=0.2)
        assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())

    def test_denoising_of_a_users_images(self):
        model = Transformer(1)
        images = Images(torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 1])
        done = run(model, mixture(model), SETTINGS.model_copy(update={"objective": "denoise"}), images=images)
        assert done.fit.losses[-1] < 0.9 * done.fit.losses[0]

    def test_clip_guidance(self):
        model = Transformer(1)
        settings = SETTINGS.model_copy(update={"objective": "clip"})
        done = run(model, mixture(model, reads="hidden"), settings, clip=ToyClip())
        assert done.fit.losses[-1] < 0.95 * done.fit.losses[0]

    def test_the_router_needs_no_training(self):
        model = Transformer(1)
        mixed = mixture(model)
        done = run(model, mixed, TrainSettings(objective="router"))
        assert done.fit.losses == []
        assert set(done.gates.gates.names) == {"", "blocks.0.attn", "blocks.0.ff"}
        observed = Values()
        with torch.no_grad(), attach(model, Mixture(mixed.experts, done.gates.gates)) as at, at.watch(observed):
            ToyDenoiser(model, PROMPTS).predict(torch.randn(5, 5, 4), torch.ones(5), range(5))
        wanted = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [0, 0]])
        for value in observed.values.values():
            assert ((value > 0.5) == (wanted > 0.5)).all(), value

    def test_output_mixing(self):
        model = Transformer(1)
        mixed = mixture(model, granularity="block", mixing="output")
        done = run(model, mixed, SETTINGS.model_copy(update={"steps": 10}))
        assert done.fit.losses[-1] < 0.9 * done.fit.losses[0]

    @pytest.mark.parametrize("objective", ["distil", "denoise"])
    def test_text_gates_start_where_the_router_puts_them(self, objective):
        model = Transformer(1)
        mixed = mixture(model, granularity="network")
        images = Images(torch.randn(4, 5, 4, generator=torch.Generator().manual_seed(0)), [0, 0, 1, 1])
        settings = SETTINGS.model_copy(update={"objective": objective, "steps": 1, "learning_rate": 1e-6})
        gates = run(model, mixed, settings, images=images if objective == "denoise" else None).gates.gates
        routed = run(model, mixed, TrainSettings(objective="router")).gates.gates
        for name, tensor in gates.state_dict().items():
            torch.testing.assert_close(tensor, routed.state_dict()[name], rtol=0, atol=1e-5)

    def test_text_gates_keep_the_mixtures_detector(self):
        model = Transformer(1)
        mixed = mixture(model)
        for objective in ("distil", "router"):
            gates = run(model, mixed, SETTINGS.model_copy(update={"objective": objective, "steps": 2})).gates.gates
            assert gates.detector is not None
            assert gates.detector.words == (("ember",), ("heart",))
            assert torch.equal(gates.detector.weight, mixed.gates.detector.weight)
            assert all(gates[name].owner.tolist() == [0, 1] for name in gates.names)

    def test_the_router_of_gates_that_read_the_mean(self):
        model = Transformer(1)
        gates = run(model, mixture(model, reads="text-mean"), TrainSettings(objective="router")).gates.gates
        assert gates.detector is None
        text = ToyDenoiser(model, PROMPTS).text.mean(1)
        wanted = torch.tensor([[1.0, 0], [0, 1], [1, 1], [0, 0], [0, 0]])
        for value in gates.values(text):
            assert ((value > 0.5) == (wanted > 0.5)).all(), value

    def test_distilled_gates_that_read_the_mean_start_where_the_router_puts_them(self):
        """Also if prompts differ little from each other, and the empty prompt differs from all."""
        model = Transformer(1)
        mixed = mixture(model, granularity="network", reads="text-mean")

        def opened(objective: str, steps: int) -> torch.Tensor:
            with attach(model, mixed) as at:
                denoiser = ToyDenoiser(model, PROMPTS)
                denoiser.text = 0.5 * denoiser.text + torch.ones(FEATURES)
                denoiser.text[-1] = 0
                settings = SETTINGS.model_copy(update={"objective": objective, "steps": steps, "learning_rate": 1e-3})
                gates = train(at, mixed, denoiser, PROMPTS, WORDS, settings).gates.gates
                return gates.values(denoiser.text.mean(1))[0]

        routed, distilled = opened("router", 1), opened("distil", 1)
        torch.testing.assert_close(distilled, routed, rtol=0, atol=0.1)
        assert distilled[0, 0] > distilled[0, 1] + 0.1  # the first prompt names the first LoRA


class TestResult:
    def test_the_file_holds_gates_and_the_record_of_the_training(self, tmp_path: Path):
        model = Transformer(1)
        mixed = mixture(model, strengths=(0.5, 1.5))
        done = run(model, mixed, SETTINGS.model_copy(update={"steps": 3}), base="Toy")
        done.gates.save(tmp_path / "g.safetensors")
        read = TrainedGates.load(tmp_path / "g.safetensors")
        assert read.base == "Toy"
        assert read.training["losses"] == done.fit.losses
        assert read.training["entropies"] == done.fit.entropies
        assert read.training["stopped"] == ""
        assert read.training["settings"]["steps"] == 3
        assert read.training["prompts"] == [prompt.text for prompt in PROMPTS]
        assert read.training["concepts"] == WORDS
        assert read.training["strengths"] == [0.5, 1.5]
        assert equal(read.of(mixed.experts, "Toy"), done.gates.gates)

    def test_the_mixture_and_the_attachment(self):
        """The mixture keeps its own gates; the attachment uses the trained ones."""
        model = Transformer(1)
        mixed = mixture(model)
        with attach(model, mixed) as at:
            done = train(at, mixed, ToyDenoiser(model, PROMPTS), PROMPTS, WORDS, SETTINGS)
            assert not mixed.gates.trained
            assert equal(at.bank.gates, done.gates.gates)
            with torch.no_grad():
                at.bank.gates[""].bias.zero_()
            assert not equal(at.bank.gates, done.gates.gates)  # a copy

    def test_one_lora(self):
        model = Transformer(1)
        mixed = mixture(model, n=1)
        prompts = prompts_for([["ember"]])
        with attach(model, mixed) as at:
            done = train(at, mixed, ToyDenoiser(model, prompts), prompts, [["ember"]], SETTINGS)
        assert done.fit.losses[-1] < done.fit.losses[0]


class TestFolder:
    def test_an_interrupted_training_resumes_and_removes_its_files(self, tmp_path: Path):
        model, kept = Transformer(1), []
        whole = run(model, mixture(model))
        reports: list[tuple[int, int, str]] = []

        def stop(done: int, total: int, what: str) -> None:
            if what.startswith("loss") and done == 9:
                raise Stop

        with pytest.raises(Stop):
            run(model, mixture(model), folder=tmp_path, progress=stop, keep=kept.append)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["examples.safetensors", "state.safetensors"]
        resumed = run(model, mixture(model), folder=tmp_path, progress=lambda *report: reports.append(report))
        assert [done for done, _, what in reports if what.startswith("loss")] == list(range(10, 21))
        assert not any(what in ("sampling", "predicting") for _, _, what in reports)  # not again
        assert equal(resumed.gates.gates, whole.gates.gates)
        assert resumed.fit.losses == whole.fit.losses
        assert list(tmp_path.iterdir()) == []
        # the result of the interrupted training
        assert kept[0].fit.stopped == "interrupted after 9 of 20 steps"
        assert kept[0].fit.losses == whole.fit.losses[:9]
        assert not equal(kept[0].gates.gates, whole.gates.gates)

    def test_cancelled_while_sampling(self, tmp_path: Path):
        model = Transformer(1)

        def stop(done: int, total: int, what: str) -> None:
            if what == "predicting":
                raise Stop

        kept: list[TrainingResult] = []
        with pytest.raises(Stop):
            run(model, mixture(model), folder=tmp_path, progress=stop, keep=kept.append)
        assert kept == []
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        "change",
        [
            {"settings": SETTINGS.model_copy(update={"seed": 1})},
            {"strengths": (1.0, 0.9)},
            {"granularity": "block"},
            {"concepts": [["ember", "embers"], ["heart"]]},
            {"base": "other"},
            {"identity": "768 x 768"},
        ],
    )
    def test_another_training_is_refused_and_its_files_are_left_alone(self, tmp_path: Path, change):
        model = Transformer(1)

        def stop(done: int, total: int, what: str) -> None:
            if what.startswith("loss"):
                raise Stop

        with pytest.raises(Stop):
            run(model, mixture(model), folder=tmp_path, progress=stop)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        mixed = mixture(model, **{k: v for k, v in change.items() if k in ("strengths", "granularity")})
        rest = {k: v for k, v in change.items() if k not in ("strengths", "granularity")}
        with pytest.raises(FormatError, match="another training"):
            run(model, mixed, folder=tmp_path, **rest)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before

    def test_examples_of_another_training_are_made_again(self, tmp_path: Path):
        model, settings = Transformer(1), SETTINGS.model_copy(update={"steps": 1})

        def stop(done: int, total: int, what: str) -> None:
            if what.startswith("loss"):
                raise Stop

        with pytest.raises(Stop):
            run(model, mixture(model), settings, folder=tmp_path, progress=stop)
        (tmp_path / "state.safetensors").unlink()
        key = read_tensors(tmp_path / "examples.safetensors")[1]["key"]
        with pytest.raises(Stop):
            run(model, mixture(model), settings, folder=tmp_path, progress=stop, identity="other")
        assert read_tensors(tmp_path / "examples.safetensors")[1]["key"] != key


class TestBadInput:
    def test_a_softmax_over_one(self):
        model = Transformer(1)
        with pytest.raises(MergeError, match=r"softmax over one LoRA[\s\S]*sigmoid"):
            run(model, mixture(model, n=1, activation="softmax"), concepts=WORDS[:1])

    def test_words_for_another_number_of_loras(self):
        model = Transformer(1)
        with pytest.raises(MergeError, match=r"words that name it[\s\S]*2 lists[\s\S]*found: +1"):
            run(model, mixture(model), concepts=WORDS[:1])

    @pytest.mark.parametrize(("strengths", "scale"), [((1.0, 0.0), 1.0), ((1.0, 1.0), 0.0)])
    def test_strength_0(self, strengths, scale):
        model = Transformer(1)
        mixed = replace(mixture(model), strengths=strengths, scale=scale)
        with pytest.raises(MergeError, match=r"strength 0 adds nothing[\s\S]*file: +adapter"):
            run(model, mixed)

    @pytest.mark.parametrize(("objective", "message"), [("denoise", "needs images"), ("clip", "needs a CLIP model")])
    def test_missing_arguments_of_an_objective(self, objective, message):
        model = Transformer(1)
        with pytest.raises(MergeError, match=rf"{message}[\s\S]*distil"):
            run(model, mixture(model), SETTINGS.model_copy(update={"objective": objective}))

    @pytest.mark.parametrize("objective", ["distil", "router"])
    def test_text_gates_without_a_detector(self, objective):
        model = Transformer(1)
        mixed = Mixture((lora(model, 1), lora(model, 2)))
        with pytest.raises(MergeError, match=r"need a concept detector[\s\S]*fit_detector"):
            run(model, mixed, SETTINGS.model_copy(update={"objective": objective}))

    def test_the_router_for_gates_that_do_not_read_text(self):
        model = Transformer(1)
        with pytest.raises(MergeError, match="router is for gates that read the text"):
            run(model, mixture(model, reads="hidden"), TrainSettings(objective="router"))

    def test_a_model_whose_images_are_not_finite(self):
        model = Transformer(1)
        model.final.bias.fill_(float("nan"))
        with pytest.raises(MergeError, match="not finite"):
            run(model, mixture(model))


def test_in_bfloat16_the_gates_stay_in_float32():
    model = Transformer(1).bfloat16()

    class Half(ToyDenoiser):
        def predict(self, noisy, t, prompts):
            return super().predict(noisy.bfloat16(), t, prompts)

        def sample(self, prompts, seed):
            return super().sample(prompts, seed).float()

    mixed = mixture(model)
    denoiser = Half(model, PROMPTS)
    denoiser.text = denoiser.text.bfloat16()
    with attach(model, mixed) as at:
        done = train(at, mixed, denoiser, PROMPTS, WORDS, SETTINGS)
    tensors = {name: tensor for name, tensor in done.gates.gates.state_dict().items() if not name.endswith("owner")}
    assert "detector.weight" in tensors
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    with attach(model, hidden := mixture(model, reads="hidden")) as at:  # these start far from their goal
        losses = train(at, hidden, denoiser, PROMPTS, WORDS, SETTINGS).fit.losses
    assert losses[-1] < 0.8 * losses[0]
    in_full = Transformer(1)
    expected = run(in_full, mixture(in_full, reads="hidden")).fit.losses
    assert close(torch.tensor(losses), torch.tensor(expected), 0.1)
