"""The prompts that pipelines encode, the rows of the prompt in their batches and passes, and gates shared between."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from diffusers.pipelines.pag.pag_utils import PAGMixin
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.guidance import PromptGateSharing
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record
from legomole.core.train.features import standardise_features
from legomole.hosts.diffusers.encoded_prompts import EncodedTexts, GuidanceRows, watch_prompts
from legomole.hosts.diffusers.mixing import denoising_model, experts, mixed
from torch import Tensor

from ...core.mole.mixtures import random_detector
from . import tiny_pipelines as tiny

# deprecations inside the libraries, and warnings about gates that were not trained for these prompts
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*(nearly off although|on although):UserWarning"),
]

SIZE = {"height": 16, "width": 16, "num_inference_steps": 2, "output_type": "latent"}
ENCODE: dict[str, dict[str, Any]] = {  # arguments of encode_prompt that have no default
    "SD 1.5": {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": False},
    "SD3": {"prompt_2": None, "prompt_3": None},
}
WIDTH = {"SD 1.5": 8, "SDXL": 20, "SD3": 24, "Flux": 16, "Lumina2": 8, "Qwen-Image": 16}


def sample(pipe: Any, prompt: str | list[str], **options: Any) -> Tensor:
    return pipe(prompt, generator=torch.Generator().manual_seed(1), **SIZE, **options).images


# ---- prompts


@pytest.fixture
def seen() -> list[list[EncodedTexts]]:
    return []


class TestWatchPrompts:
    @pytest.mark.parametrize("name", WIDTH)
    def test_states_and_texts_are_those_of_the_pipeline(self, name: str, seen: list[list[EncodedTexts]]) -> None:
        pipe = tiny.build(name)
        stop = watch_prompts(pipe, lambda encoded: seen.append(list(encoded)))
        result = pipe.encode_prompt(prompt=["a heart", "ember"], **ENCODE.get(name, {}))
        stop()
        prompt = seen[0][0]
        assert prompt.texts == ["a heart", "ember"]
        assert not prompt.negative
        assert prompt.states.shape[2] == WIDTH[name]
        assert torch.equal(prompt.states, result[0])
        assert "encode_prompt" not in vars(pipe)

    @pytest.mark.parametrize("name", ["SDXL", "SD3", "Lumina2"])
    def test_of_the_negative_prompt(self, name: str, seen: list[list[EncodedTexts]]) -> None:
        pipe = tiny.build(name)
        watch_prompts(pipe, lambda encoded: seen.append(list(encoded)))
        sample(pipe, "a heart", negative_prompt="blur")
        sample(pipe, "a heart")
        assert [[(one.texts, one.negative) for one in encoded] for encoded in seen] == [
            [(["a heart"], False), (["blur"], True)],
            [(["a heart"], False), ([""], True)],
        ]
        assert not torch.equal(seen[0][0].states, seen[0][1].states)

    def test_several_images_per_prompt_and_prompts_of_several_encoders(self, seen: list[list[EncodedTexts]]) -> None:
        pipe = tiny.build("SDXL")
        watch_prompts(pipe, lambda encoded: seen.append(list(encoded)))
        prompts = {"prompt": ["a", "b"], "prompt_2": ["a", "heart"], "negative_prompt": ["x", "y"]}
        pipe.encode_prompt(**prompts, num_images_per_prompt=2)
        assert [one.texts for one in seen[0]] == [["a", "a", "b\nheart", "b\nheart"], ["x", "x", "y", "y"]]

    def test_masks(self, seen: list[list[EncodedTexts]]) -> None:
        lumina, qwen, flux = tiny.build("Lumina2"), tiny.build("Qwen-Image"), tiny.build("Flux")
        for pipe in (lumina, qwen, flux):
            watch_prompts(pipe, lambda encoded: seen.append(list(encoded)))
        lumina.encode_prompt("a heart in ember style", negative_prompt="x")
        prompt, negative = seen[-1]
        assert prompt.mask is not None
        assert negative.mask is not None
        assert prompt.mask.dtype == torch.bool
        # the system prompt, "a style <Prompt Start>", stands before prompts only
        assert [int(mask.sum()) for mask in (prompt.mask, negative.mask)] == [6 + 5, 1]
        qwen.encode_prompt(["a heart in ember style", "heart"])
        assert seen[-1][0].mask is not None
        assert seen[-1][0].mask.tolist() == [[True] * 6, [True] * 2 + [False] * 4]  # with the word behind the prompt
        qwen.encode_prompt(["a heart"])
        assert seen[-1][0].mask is None  # there is no padding
        flux.encode_prompt("a heart")
        assert seen[-1][0].mask is None

    def test_conditioning_that_was_encoded_elsewhere(self, seen: list[list[EncodedTexts]]) -> None:
        pipe = tiny.build("SD 1.5")
        watch_prompts(pipe, lambda encoded: seen.append(list(encoded)))
        text = torch.randn(1, tiny.TOKENS, 8)
        sample(pipe, None, prompt_embeds=text, negative_prompt_embeds=text)  # type: ignore[arg-type]
        sample(pipe, None, prompt_embeds=text, negative_prompt="x")  # type: ignore[arg-type]
        assert [[(one.texts, one.negative) for one in encoded] for encoded in seen] == [[], [(["x"], True)]]

    def test_a_pipeline_that_encodes_elsewhere(self) -> None:
        pipe = SimpleNamespace()
        watch_prompts(pipe, lambda encoded: None)()
        assert vars(pipe) == {}


# ---- rows of a batch


def rows(pipe: Any, batch: int, pass_name: str = "", **arguments: Any) -> list[int]:
    found = GuidanceRows(pipe)
    found.pass_name = pass_name
    return list(found(arguments, batch))


class TestGuidanceRows:
    def test_halves_of_a_guided_batch(self) -> None:
        guided = SimpleNamespace(do_classifier_free_guidance=True)
        assert rows(guided, 2) == [1]
        assert rows(guided, 6) == [3, 4, 5]
        for plain in (SimpleNamespace(do_classifier_free_guidance=False), SimpleNamespace()):
            assert rows(plain, 3) == [0, 1, 2]

    def test_thirds_with_perturbed_attention(self) -> None:
        """The negative prompt, the prompt, and the prompt again with perturbed attention; or the last two only."""
        guided = SimpleNamespace(do_classifier_free_guidance=True, do_perturbed_attention_guidance=True)
        assert rows(guided, 3) == [1, 2]
        assert rows(guided, 6) == [2, 3, 4, 5]
        perturbed = SimpleNamespace(do_classifier_free_guidance=False, do_perturbed_attention_guidance=True)
        assert rows(perturbed, 2) == [0, 1]

    def test_the_order_of_pipelines_with_perturbed_attention(self) -> None:
        mixin = PAGMixin()
        for guided, expected in ((True, [9, 9, 1, 1, 1, 1]), (False, [1, 1, 1, 1])):
            text = mixin._prepare_perturbed_attention_guidance(torch.ones(2), torch.full((2,), 9), guided)
            assert text.tolist() == expected

    @pytest.mark.parametrize("guided", [True, False])
    def test_named_passes(self, guided: bool) -> None:
        pipe = SimpleNamespace(do_classifier_free_guidance=guided)
        for name in ("cond", "pred_cond", "pred_cond_skip", "uncond_stg", "uncond_modality"):
            assert rows(pipe, 2, name) == [0, 1]
        for name in ("uncond", "pred_uncond"):
            assert rows(pipe, 2, name) == []
        assert rows(pipe, 2, "cond_uncond") == ([1] if guided else [0, 1])  # both in one pass

    def test_passes_that_are_recognised_by_their_conditioning(self) -> None:
        pipe = tiny.build("Lumina2")
        found = GuidanceRows(pipe)
        sharing = PromptGateSharing(found)
        stop = found.watch(denoising_model(pipe), sharing)
        prompt, _, negative, _ = pipe.encode_prompt("a heart", negative_prompt="x")
        for copied in (False, True):
            one, other = (text.clone() if copied else text for text in (prompt, negative))
            assert list(found({"encoder_hidden_states": one}, 1)) == [0]
            assert list(found({"encoder_hidden_states": other}, 1)) == []
        pipe._guidance_scale = 4.0
        both = torch.cat([negative, prompt])
        assert list(found({"encoder_hidden_states": both}, 2)) == [1]  # as in a pipeline with one pass
        assert list(found({"encoder_hidden_states": torch.zeros_like(prompt)}, 2)) == [1]  # unknown
        assert list(found({}, 2)) == [1]
        pipe.encode_prompt("a heart", do_classifier_free_guidance=False)
        assert list(found({"encoder_hidden_states": negative}, 2)) == [1]  # of an earlier prompt
        stop()
        assert "encode_prompt" not in vars(pipe)


class TestSeparatePasses:
    """Gates are remembered from a prompt's pass to the negative prompt's, but never from prompt to prompt."""

    def test_only_once_a_pass_of_the_prompt_alone_has_begun(self) -> None:
        pipe = tiny.build("Flux")
        model, found = denoising_model(pipe), GuidanceRows(pipe)
        sharing = PromptGateSharing(found)
        stop = found.watch(model, sharing)
        value = torch.tensor([[0.7, 0.2]])

        def one(name: str, values: Tensor) -> Tensor:
            with model.cache_context(name):
                sharing.begin_pass({}, 1)
                return sharing("scope", values)

        assert not sharing.separate_passes
        assert torch.equal(one("uncond", value), value)
        assert not sharing.separate_passes
        assert torch.equal(one("cond", value), value)
        assert sharing.separate_passes
        assert torch.equal(one("uncond", torch.zeros(1, 2)), value)
        pipe.encode_prompt("another prompt")
        assert not sharing.separate_passes
        assert torch.equal(one("uncond", torch.zeros(1, 2)), torch.zeros(1, 2))
        stop()

    def test_names_are_those_of_the_innermost_context_and_the_model_is_restored(self) -> None:
        pipe = tiny.build("Flux")
        model, found = denoising_model(pipe), GuidanceRows(pipe)
        with model.cache_context("any"):  # diffusers sets up its hooks
            pass
        before = dict(vars(model))
        stop = found.watch(model, PromptGateSharing(found))
        with model.cache_context("cond"):
            with model.cache_context("uncond"):
                assert found.pass_name == "uncond"
            assert found.pass_name == "cond"
            with pytest.raises(ValueError, match="inside"), model.cache_context("uncond"):
                raise ValueError("inside")
            assert found.pass_name == "cond"
        assert found.pass_name == ""
        stop()
        assert vars(model) == before


# ---- gates of a pipeline


def text_mixture(pipe: Any, name: str, reads: str = "text", shift: float = 0.0) -> Mixture:
    """Two LoRAs with one random gate for the whole model, which differs between prompts of these tests.

    Args:
        pipe: The pipeline. name: Its name.
        reads: What the gate reads.
        shift: Moves the scores of its detector: with -6 no concept is found, with 6 all are.
    """
    settings = GateSettings(granularity="network", reads=reads)
    detector = random_detector(2, WIDTH[name]) if reads == "text" else None
    if detector is not None:
        detector.bias.add_(shift)
    loras = experts(pipe, [tiny.lora(pipe, 1), tiny.lora(pipe, 2)])
    with mixed(pipe, Mixture(loras, GateSet(2, settings, detector=detector))) as attachment:
        gates = standardise_features(
            attachment, lambda: [sample(pipe, ["a heart in ember style", "ember", "blur", "x"])]
        )
    with torch.no_grad():
        gates[""].weight.copy_(torch.randn(gates[""].weight.shape, generator=torch.Generator().manual_seed(0)))
    return Mixture(loras, gates)


def gates_of_passes(pipe: Any, mixture: Mixture, prompt: str | list[str], **options: Any) -> list[Tensor]:
    """The gates of every forward pass, ``(B, N)``."""
    record = Record()
    with mixed(pipe, mixture) as attachment, attachment.watch(record):
        sample(pipe, prompt, **options)
    return [one[""] for one in record.passes]


TWO_PASSES = {
    "Flux": {"negative_prompt": "blur", "true_cfg_scale": 2.0},  # passes with names
    "Qwen-Image": {"negative_prompt": "blur", "true_cfg_scale": 2.0},
    "Lumina2": {"negative_prompt": "blur"},  # without
}


class TestGatesInTwoPasses:
    @pytest.mark.parametrize("name", TWO_PASSES)
    @pytest.mark.parametrize("reads", ["text", "text-mean"])
    @pytest.mark.parametrize("prompt", ["a heart", ["a heart", "ember"]])
    def test_the_negative_prompt_follows_the_prompt(self, name: str, reads: str, prompt: str | list[str]) -> None:
        pipe = tiny.build(name)
        mixture = text_mixture(pipe, name, reads, shift=-6)  # no concept is found
        alone = gates_of_passes(pipe, mixture, prompt, true_cfg_scale=1.0) if name != "Lumina2" else None
        negative = TWO_PASSES[name]
        passes = gates_of_passes(pipe, mixture, prompt, **negative)
        assert len(passes) == 4
        for i in (0, 2):
            assert torch.equal(passes[i + 1], passes[i])
            assert alone is None or torch.equal(passes[i], alone[i // 2])
        own = gates_of_passes(pipe, mixture, "blur", **negative)
        assert float((own[0] - passes[0]).abs().max()) > 0.02

    @pytest.mark.parametrize("name", TWO_PASSES)
    def test_a_concept_that_the_negative_prompt_names_keeps_its_gate(self, name: str) -> None:
        pipe = tiny.build(name)
        mixture = text_mixture(pipe, name, shift=6)  # all concepts are found
        encoded: list[EncodedTexts] = []
        stop = watch_prompts(pipe, encoded.extend)
        first, second = gates_of_passes(pipe, mixture, "a heart", **TWO_PASSES[name])[:2]
        stop()
        negative = encoded[-1]
        assert negative.texts == ["blur"]
        own = mixture.gates[""](mixture.gates.detector(negative.states, negative.mask))
        torch.testing.assert_close(second, own, rtol=1e-4, atol=1e-5)
        assert float((second - first).abs().max()) > 1e-3

    @pytest.mark.parametrize("name", TWO_PASSES)
    def test_a_second_prompt_gets_its_own_gates(self, name: str) -> None:
        pipe = tiny.build(name)
        mixture, record = text_mixture(pipe, name, shift=-6), Record()
        with mixed(pipe, mixture) as attachment, attachment.watch(record):
            for prompt in ("a heart", "ember"):
                sample(pipe, prompt, **TWO_PASSES[name])
        passes = [one[""] for one in record.passes]
        for prompt, found in zip(("a heart", "ember"), (passes[:4], passes[4:]), strict=True):
            for one, expected in zip(found, gates_of_passes(pipe, mixture, prompt, **TWO_PASSES[name]), strict=True):
                assert torch.equal(one, expected)
        assert not torch.equal(passes[0], passes[4])

    def test_gates_that_read_hidden_states(self) -> None:
        """A pass of the prompt opens them; the negative prompt's pass of the same step gets the same."""
        pipe = tiny.build("Flux")
        settings = GateSettings(granularity="block", reads="hidden")
        loras = experts(pipe, [tiny.lora(pipe, 1), tiny.lora(pipe, 2)])
        gates = {}
        for scope in ("transformer_blocks.0", "single_transformer_blocks.0"):
            gates[scope] = gate = Gate(16, 2, settings)
            with torch.no_grad():
                gate.weight.copy_(torch.randn(gate.weight.shape, generator=torch.Generator().manual_seed(0)))
        record = Record()
        with mixed(pipe, Mixture(loras, GateSet(2, settings, gates))) as attachment, attachment.watch(record):
            sample(pipe, "a heart", **TWO_PASSES["Flux"])
        for i in (0, 2):
            for scope in gates:
                assert torch.equal(record.passes[i][scope], record.passes[i + 1][scope])
        assert not torch.equal(record.passes[0][scope], record.passes[2][scope])  # another step


class TestConditionings:
    """What text gates read in each pipeline, against the detector on single texts."""

    @pytest.mark.parametrize("name", WIDTH)
    def test_a_batch_of_prompts_equals_each_alone(self, name: str) -> None:
        """Also where a batch is padded to its longest prompt, or where padding is not marked."""
        pipe = tiny.build(name)
        mixture = text_mixture(pipe, name)
        prompts = ["a heart in ember style", "x", ""]
        options: dict[str, Any] = {"true_cfg_scale": 1.0} if name in ("Flux", "Qwen-Image") else {"guidance_scale": 1.0}
        together = gates_of_passes(pipe, mixture, prompts, **options)[0]
        for prompt, gates in zip(prompts, together, strict=True):
            alone = gates_of_passes(pipe, mixture, prompt, **options)[0]
            torch.testing.assert_close(gates[None], alone, rtol=1e-4, atol=1e-5)
        assert float((together[0] - together[1]).abs().max()) > 0.02

    @pytest.mark.parametrize("name", ["Lumina2", "Qwen-Image"])
    def test_the_mask_of_a_language_model_leaves_its_padding_out(self, name: str) -> None:
        pipe = tiny.build(name)
        mixture = text_mixture(pipe, name)
        prompts = ["a heart in ember style", "x"]
        seen: list[EncodedTexts] = []
        stop = watch_prompts(pipe, lambda encoded: seen.extend(encoded[:1]))
        options: dict[str, Any] = {"true_cfg_scale": 1.0} if name == "Qwen-Image" else {"guidance_scale": 1.0}
        found = gates_of_passes(pipe, mixture, prompts, **options)[0]
        stop()
        states, mask = seen[0].states, seen[0].mask
        assert mask is not None
        for i in range(2):
            f = mixture.gates.detector(states[i : i + 1, mask[i]])
            torch.testing.assert_close(found[i : i + 1], mixture.gates[""](f), rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("name", ["SD 1.5", "SDXL"])
    def test_conditionings_of_two_chunks(self, name: str) -> None:
        """As other libraries encode prompts of more than 77 tokens: a concept is found in either chunk."""
        pipe = tiny.build(name)
        mixture = text_mixture(pipe, name)
        detector = mixture.gates.detector
        concept = detector.weight[0] * (10 / detector.weight[0].norm())
        detector.weight.mul_(4)
        detector.bias.fill_(-12)
        extra: dict[str, Any] = {"pooled_prompt_embeds": torch.zeros(1, 6)} if name == "SDXL" else {}
        texts = [torch.randn(1, 2 * tiny.TOKENS, WIDTH[name], generator=torch.Generator().manual_seed(0))]
        texts[0] -= (texts[0] @ concept)[..., None] * concept / concept.square().sum()  # nothing of the concept
        for place in (3, tiny.TOKENS + 3):
            texts.append(texts[0].clone())
            texts[-1][0, place] = concept
        found: list[Tensor] = []
        for text in texts:
            record = Record()
            with mixed(pipe, mixture) as attachment, attachment.watch(record):
                sample(pipe, None, prompt_embeds=text, guidance_scale=1.0, **extra)  # type: ignore[arg-type]
            found.append(record.passes[0][""])
            torch.testing.assert_close(found[-1], mixture.gates[""](detector(text)))
        presence = [float(detector(text)[0, 0]) for text in texts]
        assert presence[0] < 0.1
        assert min(presence[1:]) > 0.9
        torch.testing.assert_close(found[1], found[2])


class TestWarnings:
    def gates(self, mixture: Mixture, words: Sequence[Sequence[str]]) -> Mixture:
        """With these words, and gates that are open for the first LoRA only."""
        gates = mixture.gates
        gates.detector.words = tuple(map(tuple, words))
        with torch.no_grad():
            gates[""].weight.zero_()
            gates[""].bias.copy_(torch.tensor([0.7, -9.0]))
        return mixture

    @pytest.mark.filterwarnings("error:.*although:UserWarning")
    def test_a_prompt_whose_words_and_gates_agree(self) -> None:
        pipe = tiny.build("SD 1.5")
        with mixed(pipe, self.gates(text_mixture(pipe, "SD 1.5"), [["heart"], ["ember"]])):
            sample(pipe, ["a heart"] * 2)

    def test_a_prompt_whose_words_and_gates_disagree(self) -> None:
        pipe = tiny.build("SD 1.5")
        mixture = self.gates(text_mixture(pipe, "SD 1.5"), [["heart"], ["ember"]])
        with mixed(pipe, mixture), pytest.warns(UserWarning, match="although") as caught:
            sample(pipe, "ember", negative_prompt="a house")
        found = sorted(str(warning.message) for warning in caught if "although" in str(warning.message))
        assert [text.partition(":")[0] for text in found] == [
            "adapter is nearly off although the prompt has its words (ember)",
            "adapter is on although the prompt has none of its words (heart)",
        ]
        assert all(text.endswith("for the prompt 'ember'") for text in found)

    @pytest.mark.filterwarnings("error:.*although:UserWarning")
    def test_none_after_detaching(self) -> None:
        pipe = tiny.build("SD 1.5")
        with mixed(pipe, self.gates(text_mixture(pipe, "SD 1.5"), [["heart"], ["ember"]])):
            pass
        sample(pipe, "ember")
        assert "encode_prompt" not in vars(pipe)
