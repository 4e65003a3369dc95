"""Prompts as gate training encodes them: states and positions of tokens, for every family of pipelines."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from legomole.core.train import fit_detector
from legomole.core.train.detector import _positions
from legomole.hosts.diffusers.denoiser import PipelineDenoiser, PipelinePromptEncoder

from . import tiny_pipelines as tiny

# deprecations inside the libraries
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def sd3_with_t5() -> Any:
    pipe = tiny.build("SD3")
    torch.manual_seed(0)
    pipe.register_modules(text_encoder_3=tiny.t5(24).eval(), tokenizer_3=tiny.t5_tokenizer())
    return pipe


def refiner() -> Any:
    """SDXL with its second text encoder only."""
    pipe = tiny.build("SDXL")
    pipe.register_modules(text_encoder=None, tokenizer=None)
    return pipe


# name -> pipeline, first position and number of tokens of each tokenizer
PIPELINES: dict[str, tuple[Any, dict[str, tuple[int, int]]]] = {
    "SD 1.5": (lambda: tiny.build("SD 1.5"), {"tokenizer": (0, 40)}),
    "SDXL": (lambda: tiny.build("SDXL"), {"tokenizer_2": (0, 40)}),
    "SDXL refiner": (refiner, {"tokenizer_2": (0, 40)}),
    "SD3": (lambda: tiny.build("SD3"), {"tokenizer": (0, 40), "tokenizer_2": (0, 40)}),
    "SD3, T5": (sd3_with_t5, {"tokenizer": (0, 40), "tokenizer_2": (0, 40), "tokenizer_3": (40, 256)}),
    "Flux": (lambda: tiny.build("Flux"), {"tokenizer_2": (0, 512)}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_every_token_has_a_position_padding_included(name: str) -> None:
    make, positions = PIPELINES[name]
    encoder = PipelinePromptEncoder(make())
    for prompt in ("a heart", "", "heart " * 200):
        row, ids = encoder.encode(prompt), encoder.token_ids(prompt)
        assert dict(row.offsets) == {tokenizer: first for tokenizer, (first, _) in positions.items()}
        assert {tokenizer: len(tokens) for tokenizer, tokens in ids.items()} == {
            tokenizer: length for tokenizer, (_, length) in positions.items()
        }
        assert row.mask is None
        # a T5 that SD3 has not got leaves zeros
        padding = 256 if name == "SD3" else 0
        assert len(row.states) == max(first + length for first, length in positions.values()) + padding
        assert row.states.dtype == torch.float32
        assert not row.states.requires_grad


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SD3", "Flux"])
def test_states_are_those_that_the_model_gets(name: str) -> None:
    pipe = tiny.build(name)
    caught: list[torch.Tensor] = []
    model = getattr(pipe, tiny.component(pipe))
    model.register_forward_pre_hook(
        lambda _, __, kwargs: caught.append(kwargs["encoder_hidden_states"]), with_kwargs=True
    )
    denoiser = PipelineDenoiser(pipe, ["a heart"], size=(16, 16))
    with torch.no_grad():
        denoiser.predict(denoiser.noise(1, 0), torch.tensor([0.5]), [0])
    assert torch.equal(PipelinePromptEncoder(pipe).encode("a heart").states, caught[0][0])


@pytest.mark.parametrize("name", PIPELINES)
def test_the_positions_of_a_word(name: str) -> None:
    """A letter is a token; CLIP's start token stands before them, T5's word mark before every word."""
    make, tokenizers = PIPELINES[name]
    encoder = PipelinePromptEncoder(make())
    prompt = "ab heart, xyz"
    found = _positions(prompt, 3, 8, encoder.encode(prompt), encoder)
    expected: list[int] = []
    for tokenizer, (first, _) in tokenizers.items():
        is_t5 = tokenizer == "tokenizer_3" or name == "Flux"
        # T5: mark, a, b, mark, h, e, a, r, t ..; CLIP: start, a, b, h, e, a, r, t ..
        expected += range(first + 3, first + 9) if is_t5 else range(first + 3, first + 8)
    assert found == expected


def test_a_word_that_is_cut_off_has_no_positions() -> None:
    encoder = PipelinePromptEncoder(tiny.build("SD 1.5"))
    prompt = "x " * 60 + "heart"
    assert _positions(prompt, 120, 125, encoder.encode(prompt), encoder) == []


@pytest.mark.parametrize("name", ["SD 1.5", "SDXL", "SDXL refiner", "SD3, T5", "Flux"])
def test_a_detector_can_be_fitted(name: str) -> None:
    """Letters are tokens here, so the concept has letters that are rare in English. These encoders hardly know them."""
    encoder = PipelinePromptEncoder(PIPELINES[name][0]())
    detector, notes = fit_detector([["xjz"]], encoder)

    def presence(word: str) -> float:
        prompts = [frame.format(word) for frame in ("{}", "a {}", "the {}", "{} at night", "a drawing of {}, hdr")]
        return float(torch.cat([detector(encoder.encode(prompt).states[None]) for prompt in prompts]).mean())

    assert presence("xjz") > 0.7
    if name in ("SD 1.5", "SDXL refiner"):  # eight and twelve features are too few, and a note says so
        assert "hardly tell 'xjz' from other words" in notes[0]
    else:
        assert presence("xjz") > presence("dog") + 0.1


def test_prompts_are_encoded_in_the_dtype_of_the_pipeline() -> None:
    pipe = tiny.build("SD 1.5").to(torch.bfloat16)
    states = PipelinePromptEncoder(pipe).encode("a heart").states
    assert states.dtype == torch.float32
    assert torch.equal(states, states.bfloat16().float())
