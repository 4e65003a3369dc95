"""The text encoder: CLIP-L with weights generated from a seed, the same in transformers and in ComfyUI.

A trained one would be a download of 246 MB. This one is generated, not trained: every token has a random embedding
(embeddings of synonyms are correlated), one layer attends to the preceding tokens, the other eleven are identities.
Padding is not attended to, so that all tokens after a prompt's last word have equal states, a summary of the prompt.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from . import words

WIDTH, HEADS, INNER, LAYERS, VOCABULARY = 768, 12, 3072, 12, 49408
KNOWN = (*words.IDS.values(), words.START, words.END)
_SEED = 7000
_BLIND = 16.0  # q's bias, and -k of padding, in the first dimension of each head: a logit of -16 * 16 / 8


def _random(seed: int, *shape: int) -> NDArray[np.float64]:
    # numpy guarantees the stream of RandomState across versions, but not that of Generator
    return np.random.RandomState(_SEED + seed).standard_normal(shape)


@cache
def _synonym_of() -> dict[int, str]:
    """Token -> first word of its group of synonyms, which share half of their embeddings' variance."""
    groups = {word: (word, *others) for word, others in words.SYNONYMS.items()}
    return {words.IDS[member]: word for word, group in groups.items() for member in group}


def embedding(token: int) -> NDArray[np.float64]:
    """Return the embedding ``(WIDTH,)`` of a token."""
    unique = _random(token, WIDTH)
    shared = _synonym_of().get(token)
    return unique if shared is None else (unique + _random(100_000 + words.IDS[shared], WIDTH)) / 2**0.5


def add_tokens(encoder: Any, tokens: Iterable[int]) -> None:
    """Give tokens outside of `KNOWN`, which have an embedding of zeros, a random one that depends on the token only."""
    inner: Any = encoder if hasattr(encoder, "embeddings") else encoder.text_model
    table = inner.embeddings.token_embedding.weight
    for token in set(tokens) - set(KNOWN):
        if not table[token].any():
            table[token] = torch.from_numpy(embedding(token)).to(table)


def _normed(x: NDArray[np.float64]) -> NDArray[np.float64]:
    return (x - x.mean()) / x.std()


def weights(layers: int = LAYERS, tokens: Sequence[int] | None = None) -> dict[str, Tensor]:
    """Return a state dict of `transformers.CLIPTextModel`, float16.

    Args:
        layers: Number of layers, counted from the first, at most twelve.
        tokens: Tokens that get an embedding, the others being zero; default all. Embeddings of tokens outside of
            `words.IDS` are random values that the model was not trained on.
    """
    table = np.zeros((VOCABULARY, WIDTH), np.float16)
    if tokens is None:
        unseen = np.random.RandomState(_SEED + 300_000)  # one generator for all: one per token would be slow
        for rows in np.split(table, 64):
            rows[:] = unseen.standard_normal(rows.shape)
        tokens = KNOWN
    for token in tokens:
        table[token] = embedding(token)
    state: dict[str, Any] = {
        "embeddings.token_embedding.weight": table,
        "embeddings.position_embedding.weight": np.zeros((words.LENGTH, WIDTH)),
        "final_layer_norm.weight": np.ones(WIDTH),
        "final_layer_norm.bias": np.zeros(WIDTH),
    }
    for i in range(layers):
        layer = _first_layer() if i == 0 else _idle_layer()
        state |= {f"encoder.layers.{i}.{name}": value for name, value in layer.items()}
    return {f"text_model.{name}": torch.from_numpy(np.asarray(value, np.float16)) for name, value in state.items()}


def _idle_layer() -> dict[str, NDArray[np.float64]]:
    layer = {
        f"layer_norm{n}.{part}": np.full(WIDTH, value)
        for n in (1, 2)
        for part, value in (("weight", 1.0), ("bias", 0.0))
    }
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{name}.weight": np.zeros((WIDTH, WIDTH)), f"self_attn.{name}.bias": np.zeros(WIDTH)}
    layer |= {"mlp.fc1.weight": np.zeros((INNER, WIDTH)), "mlp.fc1.bias": np.zeros(INNER)}
    return layer | {"mlp.fc2.weight": np.zeros((WIDTH, INNER)), "mlp.fc2.bias": np.zeros(WIDTH)}


def _first_layer() -> dict[str, NDArray[np.float64]]:
    layer, d = _idle_layer(), WIDTH**-0.5
    first = np.arange(0, WIDTH, WIDTH // HEADS)
    layer["self_attn.q_proj.weight"] = 0.5 * d * _random(200_001, WIDTH, WIDTH)
    layer["self_attn.k_proj.weight"] = 0.5 * d * _random(200_002, WIDTH, WIDTH)
    layer["self_attn.q_proj.weight"][first] = 0
    layer["self_attn.q_proj.bias"][first] = _BLIND
    padding = _normed(embedding(words.END))
    layer["self_attn.k_proj.weight"][first] = -_BLIND * padding / (padding @ padding)
    layer["self_attn.v_proj.weight"] = d * _random(200_003, WIDTH, WIDTH)
    layer["self_attn.out_proj.weight"] = 2 * d * _random(200_004, WIDTH, WIDTH)
    layer["mlp.fc1.weight"] = d * _random(200_005, INNER, WIDTH)
    layer["mlp.fc2.weight"] = 0.5 * INNER**-0.5 * _random(200_006, WIDTH, INNER)
    return layer


@cache
def build() -> Any:
    """Build a `transformers.CLIPTextModel` of one layer with the words of `words.IDS`, float32, frozen; cached."""
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=INNER, num_attention_heads=HEADS, num_hidden_layers=1,
                            vocab_size=VOCABULARY, max_position_embeddings=words.LENGTH, bos_token_id=words.START,
                            eos_token_id=words.END, pad_token_id=words.END)  # fmt: skip
    with torch.device("meta"):
        model = CLIPTextModel(config)
    state = weights(1, KNOWN)
    inner: Any = model if hasattr(model, "embeddings") else model.text_model  # transformers before 5 nests it
    inner.load_state_dict({n.removeprefix("text_model."): w.float() for n, w in state.items()}, assign=True)
    inner.embeddings.position_ids = torch.arange(words.LENGTH)[None]  # a buffer that the state dict does not contain
    return model.eval().requires_grad_(False)
