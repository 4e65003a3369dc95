"""Tiny language models to load PEFT adapters into, always with the same weights."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

TOKENS = torch.tensor([[1, 5, 3, 2]])


def llama(layers: int = 12, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=layers, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=32, **settings,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def gpt2() -> Any:
    torch.manual_seed(0)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=32)).eval()


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits
