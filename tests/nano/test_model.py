"""The transformer, and shortened prompts that are equivalent to whole ones."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

pytest.importorskip("diffusers")

from legomole.core.errors import MergeError
from legomole.nano import model

TEXTS = ["a heart in ember style", "the mushroom, drawn in blueprint style", ""]


@pytest.fixture
def transformer(seeded):
    return model.build().eval()


def predict(transformer, prompts, x):
    hidden, pooled = prompts(TEXTS)
    return transformer(
        hidden_states=x, timestep=torch.tensor([900.0, 400.0, 100.0]), encoder_hidden_states=hidden,
        pooled_projections=pooled, return_dict=False,
    )[0]  # fmt: skip


def test_size_and_shape(transformer):
    assert sum(p.numel() for p in transformer.parameters()) == pytest.approx(4.0e6, rel=0.02)
    x = torch.randn(3, 16, 8, 8)
    assert predict(transformer, model.Prompts(), x).shape == x.shape
    assert len(transformer.transformer_blocks) == transformer.config.num_attention_heads  # ComfyUI's rule


def test_short_prompts_give_the_same_result(transformer):
    short, whole = model.Prompts(short=True), model.Prompts()
    assert short(TEXTS)[0].shape == (3, 12, 768)
    assert whole(TEXTS)[0].shape == (3, 77, 768)
    assert torch.equal(short(TEXTS)[1], whole(TEXTS)[1])
    x = torch.randn(3, 16, 8, 8)
    weights = [p for p in transformer.parameters() if p.requires_grad]
    found = []
    for prompts, counting in ((short, model.short_prompts(transformer)), (whole, nullcontext())):
        at = x.clone().requires_grad_()
        with counting:
            out = predict(transformer, prompts, at)
            found.append((out, *torch.autograd.grad(out.square().sum(), [at, *weights], allow_unused=True)))
    compared = 0
    for a, b in zip(*found, strict=True):
        if a is None or b is None:
            assert a is None
            assert b is None
            continue
        compared += 1
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.detach().abs().max()))
    assert compared > 60


def test_longer_short_prompts_give_the_same_result_on_a_wide_canvas(transformer):
    short, whole = (model.Prompts(short=short, any_words=True, tokens=18) for short in (True, False))
    text = "please paint one star on the left, one house on the right, flat"
    assert short([text])[0].shape == (1, 18, 768)
    x = torch.randn(1, 16, 8, 16)
    with torch.no_grad():
        with model.short_prompts(transformer, 18):
            a = model.predict(transformer, x, torch.full((1,), 0.5), *short([text]))
        b = model.predict(transformer, x, torch.full((1,), 0.5), *whole([text]))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))


def test_short_prompts_differ_outside_the_block(transformer):
    short, whole = model.Prompts(short=True), model.Prompts()
    x = torch.randn(3, 16, 8, 8)
    before = transformer.attn_processors
    with model.short_prompts(transformer):
        assert transformer.attn_processors.keys() == before.keys()
        assert set(map(id, transformer.attn_processors.values())) & set(map(id, before.values())) == set()
    assert transformer.attn_processors == before
    with torch.no_grad():
        a, b = predict(transformer, short, x), predict(transformer, whole, x)
    assert (a - b).abs().max() > 1e-4 * b.abs().max()


def test_a_prompt_of_ten_words_can_be_shortened_and_one_of_eleven_cannot():
    prompts = model.Prompts(short=True)
    prompts(["a " * 10])
    with pytest.raises(ValueError, match="more than 10 words"):
        prompts(["a " * 11])


def test_each_prompt_is_encoded_once():
    calls = []
    prompts = model.Prompts()
    encoder = prompts.encoder

    def counting(input_ids):
        calls.append(len(input_ids))
        return encoder(input_ids=input_ids)

    prompts.encoder = counting
    hidden, _ = prompts(["a star", "a moon", "a star"])
    again, _ = prompts(["a moon", "a ring"])
    assert calls == [2, 1]
    assert torch.equal(hidden[0], hidden[2])
    assert torch.equal(hidden[1], again[0])


class TestAnyWords:
    def test_known_prompts_are_encoded_as_before(self):
        for one, other in zip(model.Prompts(any_words=True)(TEXTS), model.Prompts()(TEXTS), strict=True):
            assert torch.equal(one, other)

    def test_unknown_words_have_states_of_their_own(self):
        with pytest.raises(MergeError, match="zebra"):
            model.Prompts()(["a zebra"])
        hidden, _ = model.Prompts(any_words=True)(["a zebra", "a quagga", "a heart"])
        token = hidden[:, 2]
        assert (token[0] - token[1]).abs().max() > 0.1
        assert (token[0] - token[2]).abs().max() > 0.1
        assert torch.equal(hidden[0, 1], hidden[1, 1])  # the words before are the same

    def test_long_prompts_are_cut(self):
        hidden, _ = model.Prompts(any_words=True)(["zebra " * 75, "zebra " * 75 + "heart"])
        assert torch.equal(hidden[0], hidden[1])
