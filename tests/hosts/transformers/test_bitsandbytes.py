"""Mixtures on models quantised to 8 or 4 bits by bitsandbytes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("bitsandbytes")

import bitsandbytes
import transformers
from legomole.core.adapter import Adapter
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings
from legomole.hosts.transformers.mixing import mixed
from legomole.hosts.transformers.training import train_gates

from .tiny_language import llama, lora, prompts

# warnings inside the libraries: 8-bit layers compute in float16
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")
BITS = {
    8: {"load_in_8bit": True},
    4: {"load_in_4bit": True, "bnb_4bit_compute_dtype": torch.float32, "bnb_4bit_quant_type": "nf4"},
}


@pytest.fixture(params=[8, 4])
def quantised(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    llama().save_pretrained(tmp_path)
    config = transformers.BitsAndBytesConfig(**BITS[request.param])
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, quantization_config=config, device_map="cpu", dtype=torch.float32
    )
    kind = bitsandbytes.nn.Linear8bitLt if request.param == 8 else bitsandbytes.nn.Linear4bit
    assert isinstance(model.model.layers[0].self_attn.q_proj, kind)
    return model.eval().requires_grad_(False)


def pair(size: float = 0.25) -> tuple[Adapter, Adapter]:
    """Adapters for the model before quantisation, whose weights still have their shapes."""
    return lora(llama(), 1, size=size), lora(llama(), 2, 3, size=size)


def test_a_mixture_adds_its_deltas_to_the_quantised_layers_outputs(quantised: Any) -> None:
    ids, (one, two) = prompts(6)[0], pair()
    with torch.no_grad():
        before = quantised(ids).logits
        with mixed(quantised, Mixture((one, two), strengths=(0.7, -1.2))):
            found = quantised(ids).logits
        assert torch.equal(quantised(ids).logits, before)
        for name in one.modules:
            delta = 0.7 * one.modules[name].delta() - 1.2 * two.modules[name].delta()
            quantised.get_submodule(name).register_forward_hook(
                lambda _, args, out, delta=delta: out + args[0].to(delta) @ delta.T
            )
        expected = quantised(ids).logits
    assert float((expected - before).abs().max()) > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_a_mixture_is_close_to_the_one_on_the_model_before_quantisation(quantised: Any) -> None:
    """The adapters' effect is preserved: the difference is about that of quantisation alone."""
    ids, plain, mixture = prompts(6)[0], llama(), Mixture(pair())
    with torch.no_grad():
        quantisation = (quantised(ids).logits - plain(ids).logits).norm()
        before = plain(ids).logits
        with mixed(quantised, mixture), mixed(plain, mixture):
            difference, effect = quantised(ids).logits - plain(ids).logits, plain(ids).logits - before
    assert difference.norm() < 2 * quantisation
    assert difference.norm() < 0.5 * effect.norm()


def test_gates_learn_on_a_quantised_model(quantised: Any) -> None:
    mixture = Mixture(pair(0.5), GateSet(2, GateSettings(reads="hidden")))
    examples = [[(torch.tensor([1 + i, 20 + j]), torch.tensor([30 + i, 31])) for j in range(3)] for i in range(2)]
    before = [parameter.clone() for parameter in quantised.parameters()]
    result = train_gates(
        quantised, mixture, examples, None, FitSettings(steps=12, batch=6, warmup=0, learning_rate=0.1)
    )
    assert result.fit.losses[-1] < 0.9 * result.fit.losses[0]
    assert all(torch.equal(a, b) for a, b in zip(before, quantised.parameters(), strict=True))
