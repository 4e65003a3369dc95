"""A pretrained Llama of which only the upper half is run: no adapter changes the lower half, whose output is stored.

`Upper` is an ordinary transformers model of the upper blocks. Its "tokens" are rows of a table of hidden states, one
for every position of every prompt, so that hosts, PEFT and gates work on it as on any other language model. Answers
are tokens of the original vocabulary, which comes first in the table (with zeros: answers are not read).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

_BATCH = 32


def load_pretrained(folder: Path, dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """Load model and tokenizer from a folder that holds either a saved model or a single GGUF file."""
    gguf = next((file.name for file in folder.glob("*.gguf")), None)
    options = {} if gguf is None else {"gguf_file": gguf}
    tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, **options).eval().requires_grad_(False), tokenizer


class Upper:
    """The upper half of a model, with a table of what its lower half made of the prompts.

    Args:
        pretrained: The whole model.
    """

    def __init__(self, pretrained: Any) -> None:
        self._whole = pretrained
        config = pretrained.config
        self.blocks = config.num_hidden_layers // 2
        shape = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads",
                 "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters")  # fmt: skip
        kept = {key: getattr(config, key) for key in shape}
        upper = LlamaConfig(num_hidden_layers=self.blocks, tie_word_embeddings=False, pad_token_id=0, **kept)
        with torch.device("meta"):
            self.model: Any = LlamaForCausalLM(upper)
        whole = pretrained.state_dict()
        first = config.num_hidden_layers - self.blocks
        state = {
            f"model.layers.{int(name.split('.')[2]) - first}.{name.split('.', 3)[3]}": tensor
            for name, tensor in whole.items()
            if name.startswith("model.layers.") and int(name.split(".")[2]) >= first
        }
        state |= {"model.norm.weight": whole["model.norm.weight"], "lm_head.weight": whole["lm_head.weight"]}
        self._table = [torch.zeros(config.vocab_size, config.hidden_size, dtype=pretrained.dtype)]
        state["model.embed_tokens.weight"] = self._table[0]
        self.model.load_state_dict(state, assign=True)
        self.model.model.rotary_emb = type(self.model.model.rotary_emb)(upper)
        self.model.eval().requires_grad_(False)
        # the product with a view, such as the states of the last tokens, is ten times as slow
        self.model.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))

    def rows(self, prompts: Sequence[Sequence[int]], cache: Path) -> list[tuple[int, ...]]:
        """Add prompts to the table, and return their rows, which take the place of token ids.

        Args:
            prompts: Token ids. cache: File in which the hidden states of these prompts are kept.
        """
        if cache.exists():
            states = torch.load(cache)
        else:
            states = torch.cat(self._states(prompts))
            part = cache.with_suffix(".part")
            torch.save(states, part)
            part.replace(cache)
        start = sum(map(len, self._table))
        self._table.append(states)
        table = nn.Embedding.from_pretrained(torch.cat(self._table), freeze=True)
        self._table = [table.weight.data]
        self.model.model.embed_tokens = table
        rows: list[tuple[int, ...]] = []
        for ids in prompts:
            rows.append(tuple(range(start, start + len(ids))))
            start += len(ids)
        if start != len(table.weight):
            raise ValueError(f"{cache} holds the states of other prompts: delete it")
        return rows

    @torch.inference_mode()
    def _states(self, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
        """Output ``(T, hidden)`` of the lower half for each prompt."""
        lower = self._whole.model
        blocks, lower.layers = lower.layers, lower.layers[: len(lower.layers) - self.blocks]
        norm, lower.norm = lower.norm, nn.Identity()
        states: list[Tensor] = [torch.empty(0)] * len(prompts)
        try:
            for chosen in by_length(list(map(len, prompts)), _BATCH):
                ids, mask = padded([prompts[i] for i in chosen])
                hidden = lower(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                for i, row in zip(chosen, hidden, strict=True):
                    states[i] = row[len(row) - len(prompts[i]) :].clone()
        finally:
            lower.layers, lower.norm = blocks, norm
        return states


def by_length(lengths: Sequence[int], size: int) -> Iterable[list[int]]:
    """Indices in batches of like length."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return (order[i : i + size] for i in range(0, len(order), size))


def padded(prompts: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """``ids`` and ``mask (B, T)``, padded on the left, so that every prompt ends in the last column."""
    T = max(map(len, prompts))
    ids = torch.tensor([[0] * (T - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (T - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return ids, mask


def last_logits(model: Any, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Logits ``(B, V)`` after the last token of each prompt."""
    ids, mask = padded(prompts)
    return model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False).logits[:, -1]
