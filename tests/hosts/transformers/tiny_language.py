"""Tiny language models from configs, LoRAs for them as PEFT names them, and merged weights to compare mixtures with."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
import transformers
from legomole.core.adapter import Adapter
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.hosts.transformers.mixing import mixed
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

WORDS = 40
READS = ("hidden", "experts", "token")
WITHOUT_GRADIENTS = [
    pytest.mark.usefixtures("no_gradients"),
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning"),  # transformers' own
]
# the argument for a key-value cache: since transformers 5.24, and before
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


def gate_settings(reads: str, granularity: str = "layer", activation: str = "sigmoid") -> GateSettings:
    return GateSettings(reads=reads, granularity=granularity, activation=activation)  # type: ignore[arg-type]


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


def logits(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


def llama(tied: bool = False, **more: Any) -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        vocab_size=WORDS, tie_word_embeddings=tied, initializer_range=0.2, pad_token_id=0, eos_token_id=None,
        bos_token_id=None, **more,
    )  # fmt: skip
    return _seeded(transformers.LlamaForCausalLM, config)


def tokenizer() -> Any:
    """A tokenizer of whole words, ``w0`` to ``w39``."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(WORDS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=words, pad_token="w0", model_input_names=["input_ids"])


def gpt2() -> Any:
    config = transformers.GPT2Config(
        n_embd=16, n_layer=2, n_head=2, vocab_size=WORDS, initializer_range=0.2, n_positions=64, pad_token_id=0,
        eos_token_id=None, bos_token_id=None, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    return _seeded(transformers.GPT2LMHeadModel, config)


def bert() -> Any:
    config = transformers.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, vocab_size=WORDS,
        initializer_range=0.2, num_labels=3,
    )  # fmt: skip
    return _seeded(transformers.BertForSequenceClassification, config)


def _seeded(kind: Any, config: Any) -> Any:
    torch.manual_seed(0)
    return kind(config).eval().requires_grad_(False)


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert, "tied": lambda: llama(tied=True)}
CAUSAL = ("llama", "gpt2")
TARGETS = {
    "LlamaForCausalLM": ("q_proj", "v_proj", "o_proj", "up_proj", "down_proj"),
    "GPT2LMHeadModel": ("c_attn", "c_fc", "attn.c_proj"),
    "BertForSequenceClassification": ("query", "value", "attention.output.dense", "intermediate.dense"),
}


def lora(model: nn.Module, seed: int, rank: int = 2, size: float = 0.25, more: Sequence[str] = ()) -> Adapter:
    """Random factors for some layers that PEFT targets."""
    g = torch.Generator().manual_seed(seed)
    targets = (*TARGETS[type(model).__name__], *more)
    modules: dict[str, LowRank] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, (nn.Linear, Conv1D)) and name.endswith(targets):
            d_out, d_in = layer.weight.T.shape if isinstance(layer, Conv1D) else layer.weight.shape
            A = torch.randn(rank, d_in, generator=g)
            modules[name] = LowRank(A, size * torch.randn(d_out, rank, generator=g), 1.5 * rank)
    return Adapter(modules)


def merged(model: Any, adapters: Sequence[Adapter], gates: Sequence[float] | Mapping[str, Tensor]) -> Any:
    """A copy with the LoRAs merged into its weights, at one gate value each, or at values ``(N,)`` by module name."""
    model = copy.deepcopy(model)
    for i, adapter in enumerate(adapters):
        for name, part in adapter.modules.items():
            layer = model.get_submodule(name)
            g = float(gates[name][i] if isinstance(gates, Mapping) else gates[i])
            layer.weight += g * (part.delta().T if isinstance(layer, Conv1D) else part.delta())
    return model


def prompts(*lengths: int, seed: int = 0) -> list[Tensor]:
    """Random token ids ``(1, T)`` for each length, none of them 0."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randint(1, WORDS, (1, n), generator=g) for n in lengths]


def padded(texts: Sequence[Tensor], side: str) -> dict[str, Tensor]:
    """Pad texts to a batch, as tokenizers do."""
    T = max(text.shape[1] for text in texts)
    rows, masks = [], []
    for text in texts:
        gap = T - text.shape[1]
        pad = (gap, 0) if side == "left" else (0, gap)
        rows.append(nn.functional.pad(text, pad))
        masks.append(nn.functional.pad(torch.ones_like(text), pad))
    return {"input_ids": torch.cat(rows), "attention_mask": torch.cat(masks)}


def mixture(model: Any, settings: GateSettings, mixing: str = "delta", size: float = 1.0, **kw: Any) -> Mixture:
    """Two LoRAs with random gates of the sizes that training would give them."""
    experts = lora(model, 1, **kw), lora(model, 2, 3, **kw)
    even = Mixture(experts, GateSet(2, settings), mixing=mixing)  # type: ignore[arg-type]
    features_of: dict[str, tuple[int, Tensor | None]] = {}  # scope -> number of features, their owners
    with (
        attach(model, even) as attachment,
        attachment.watch_inputs(lambda scope, f, owner: features_of.update({scope: (f.shape[1], owner)})),
        torch.no_grad(),
    ):
        model(prompts(5)[0], **({} if type(model).__name__.startswith("Bert") else {"use_cache": False}))
        layers = attachment.layers_read
    g = torch.Generator().manual_seed(3)
    gates: dict[str, Gate] = {}
    for scope, (features, owner) in features_of.items():
        gates[scope] = gate = Gate(features, 2, settings, owner=owner, layer=layers[scope])
        with torch.no_grad():
            gate.weight.copy_(size * torch.randn(gate.weight.shape, generator=g))
            gate.bias.add_(0.3 * torch.randn(gate.bias.shape, generator=g))
    return Mixture(experts, GateSet(2, settings, gates), mixing=mixing)  # type: ignore[arg-type]


class GateRecorder:
    """Records gate values by forward pass and scope. A `GateObserver`."""

    def __init__(self) -> None:
        self.passes: list[dict[str, Tensor]] = []

    def begin_pass(self, arguments: object) -> None:
        self.passes.append({})

    def gate_opened(self, scope: str, value: Tensor) -> None:
        self.passes[-1][scope] = value

    def regions_laid(self, maps: object) -> None:
        pass

    def first_pass(self, attachment: Attachment) -> dict[str, Tensor]:
        """Module name -> its gate ``(B, N)`` in the first forward pass."""
        bank = attachment.bank
        return {name: self.passes[0][bank.scopes[path].name] for name, path in bank.paths.items()}


def gate_values(model: Any, mixture: Mixture, **inputs: Any) -> dict[str, Tensor]:
    """Module name -> its gate ``(B, N)`` in a forward pass of the model."""
    recorder = GateRecorder()
    with mixed(model, mixture) as attachment, attachment.watch(recorder), torch.no_grad():
        model(**inputs)
        return recorder.first_pass(attachment)


def generate(model: Any, inputs: Mapping[str, Tensor], tokens: int = 8, **kw: Any) -> Tensor:
    """The new tokens of greedy decoding."""
    ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, **kw)
    return ids[:, inputs["input_ids"].shape[1] :]
