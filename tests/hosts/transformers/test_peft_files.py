"""PEFT as the oracle: we read its folders, and it reads ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")

from legomole.core.adapter import Adapter  # noqa: E402
from legomole.core.formats import load, save  # noqa: E402
from legomole.core.lowrank import LowRank  # noqa: E402
from torch import nn  # noqa: E402

from .models_for_peft import gpt2, llama, logits  # noqa: E402

# warnings within the libraries: deprecations, and PEFT's about embeddings and one-dimensional biases that it wrote
pytestmark = pytest.mark.filterwarnings(
    "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore:.*embedding layers", "ignore:.*invalid shape"
)


def apply(model: nn.Module, adapter: Adapter, transpose: bool = False) -> None:
    with torch.no_grad():
        for name, part in adapter.modules.items():
            embedding = name.endswith(".lora_embedding")
            delta = part.delta()
            weight = model.get_submodule(name.removesuffix(".lora_embedding")).weight
            assert isinstance(weight, nn.Parameter)
            weight += delta.T if transpose or embedding else delta


@pytest.mark.parametrize(
    ("model", "targets", "transpose"),
    [
        (
            llama,
            ["model.layers.1.mlp.up_proj", "model.layers.11.mlp.up_proj", "model.layers.0.self_attn.q_proj"],
            False,
        ),
        (gpt2, ["transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_fc"], True),
    ],
)
def test_our_folder_in_peft(model: Any, targets: list[str], transpose: bool, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(1)
    modules = {}
    for i, name in enumerate(targets):
        shape = model().get_submodule(name).weight.shape
        d_out, d_in = shape[::-1] if transpose else shape
        A, B = torch.randn(i + 1, d_in, generator=g), torch.randn(d_out, i + 1, generator=g)
        modules[name] = LowRank(A, B, [None, 3.0, 0.7][i])
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": transpose}
    ours = Adapter(modules, metadata={"adapter_config": json.dumps(config)})
    path = save(ours, tmp_path / "x", format="peft")

    by_hand = model()
    apply(by_hand, ours, transpose)
    expected = logits(by_hand)
    assert not torch.allclose(expected, logits(model()), atol=1e-3)
    loaded = peft.PeftModel.from_pretrained(model(), str(path))
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rslora", [False, True])
def test_pefts_folder_in_ours(rslora: bool, tmp_path: Path) -> None:
    """Patterns, rsLoRA, an embedding and a bias of B: our deltas give PEFT's logits."""
    config = peft.LoraConfig(
        r=4, lora_alpha=6, use_rslora=rslora, target_modules=["q_proj", "up_proj", "embed_tokens"],
        rank_pattern={"layers.1.mlp.up_proj": 2}, alpha_pattern={"q_proj": 3}, init_lora_weights=False,
    )  # fmt: skip
    theirs = peft.get_peft_model(llama(), config)
    expected = logits(theirs.eval())
    theirs.save_pretrained(str(tmp_path / "x"))
    ours = load(tmp_path / "x")
    assert ours.modules["model.layers.1.mlp.up_proj"].rank == 2
    by_hand = llama()
    apply(by_hand, ours)
    torch.testing.assert_close(logits(by_hand), expected, rtol=1e-4, atol=1e-5)

    again = peft.PeftModel.from_pretrained(llama(), str(save(ours, tmp_path / "y")))
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-5)


def test_a_bias_of_B(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=2, lora_alpha=5, lora_bias=True, target_modules=["q_proj"], init_lora_weights=False)
    theirs = peft.get_peft_model(llama(attention_bias=True), config).eval()
    theirs.save_pretrained(str(tmp_path / "x"))
    ours = load(tmp_path / "x")
    assert len(ours.diffs) == 12
    again = peft.PeftModel.from_pretrained(llama(attention_bias=True), str(save(ours, tmp_path / "y")))
    torch.testing.assert_close(logits(again), logits(theirs), rtol=1e-4, atol=1e-5)
