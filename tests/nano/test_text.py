"""The text encoder generated from a seed. Oracle: transformers, with all twelve layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from legomole.nano import text, words
from torch import Tensor
from torch.nn.functional import cosine_similarity

transformers: Any = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def encoder() -> Any:
    return text.build()


def states(encoder: Any, *prompts: str) -> Tensor:
    return encoder(input_ids=torch.tensor([words.tokens(p) for p in prompts])).last_hidden_state


def test_embeddings_do_not_change_between_versions():
    # from numpy's RandomState(7000 + 320), and from two such streams for a word with synonyms
    assert text.embedding(words.IDS["a"])[:3] == pytest.approx([-1.000879, -0.028444, -0.704161], abs=1e-6)
    assert text.embedding(words.IDS["heart"])[:3] == pytest.approx([-1.576999, -0.69333, 0.050926], abs=1e-6)


def test_all_tokens_after_a_prompt_have_equal_states(encoder):
    found = states(encoder, "a heart in ember style")[0]
    assert all(torch.equal(found[6], row) for row in found[7:])
    assert all((found[i] - found[6]).abs().max() > 0.1 for i in range(6))


def test_twelve_layers_give_the_same_states_as_one(encoder):
    config = transformers.CLIPTextConfig(
        hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12, bos_token_id=words.START,
        eos_token_id=words.END, pad_token_id=words.END,
    )  # fmt: skip
    prompts = ("a heart in ember style", "")
    with torch.device("meta"):
        whole = transformers.CLIPTextModel(config)
    state = text.weights(tokens=sorted({token for p in prompts for token in words.tokens(p)}))
    inner = whole if hasattr(whole, "embeddings") else whole.text_model
    inner.load_state_dict({n.removeprefix("text_model."): w.float() for n, w in state.items()}, assign=True)
    inner.embeddings.position_ids = torch.arange(77)[None]
    with torch.no_grad():
        found = whole.eval()(input_ids=torch.tensor([words.tokens(p) for p in prompts]))
    ours = states(encoder, *prompts)
    torch.testing.assert_close(found.last_hidden_state, ours, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.pooler_output, ours[:, -1], rtol=0, atol=1e-6)  # pooled: end token


def test_the_summary_depends_on_every_word(encoder):
    plain, *others = states(
        encoder, "a heart in ember style", "the heart in ember style", "a fish in ember style", "a heart in wood style"
    )[:, -1]
    assert all((plain - other).abs().max() > 0.1 for other in others)


def test_synonyms_are_near(encoder):
    def near(a: str, b: str) -> float:
        x, y = (torch.tensor(text.embedding(words.IDS[word])) for word in (a, b))
        return float(cosine_similarity(x, y, dim=0))

    assert near("heart", "love") == pytest.approx(0.5, abs=0.1)
    assert near("lightning", "flash") == pytest.approx(0.5, abs=0.1)
    assert near("heart", "fish") == pytest.approx(0.0, abs=0.1)
    assert near("heart", "a") == pytest.approx(0.0, abs=0.1)

    heart, love, fish = states(encoder, "a heart", "a love", "a fish")[:, -1]
    assert cosine_similarity(heart, love, dim=0) > cosine_similarity(heart, fish, dim=0) + 0.05


def test_the_encoder_has_exactly_the_vocabulary(encoder):
    inner = encoder if hasattr(encoder, "embeddings") else encoder.text_model
    table = inner.embeddings.token_embedding.weight
    known = set(table.abs().sum(1).nonzero().flatten().tolist())
    assert known == {*words.IDS.values(), words.START, words.END} == set(text.KNOWN)
    assert not any(p.requires_grad for p in encoder.parameters())


def test_the_file_for_comfyui_has_every_token_and_layer():
    state = text.weights()
    table = state["text_model.embeddings.token_embedding.weight"]
    assert table.shape == (49408, 768)
    assert table.abs().sum(1).all()
    assert torch.equal(table[1936], torch.tensor(text.embedding(1936)).half())
    assert float(table[7] @ table[8]) != pytest.approx(float(table[7] @ table[7]))  # rows differ
    assert {w.dtype for w in state.values()} == {torch.float16}
    layers = {name.split(".")[3] for name in state if ".layers." in name}
    assert layers == {str(i) for i in range(12)}


def test_tokens_of_other_words_are_added_to_the_encoder():
    """As `embedding` gives them, without a change to the others."""
    build: Any = text.build.__wrapped__
    encoder = build()
    table = (encoder if hasattr(encoder, "embeddings") else encoder.text_model).embeddings.token_embedding.weight
    before = table.clone()
    assert not before[5000].any()
    for _ in range(2):  # the second time they are there
        text.add_tokens(encoder, [5000, 6001, words.IDS["heart"], words.END])
        torch.testing.assert_close(table[5000], torch.from_numpy(text.embedding(5000)).float())
        assert not torch.equal(table[5000], table[6001])
        table[[5000, 6001]] = table[[5000, 6001]].clone()
    rest = [i for i in range(len(table)) if i not in (5000, 6001)]
    assert torch.equal(table[rest], before[rest])
