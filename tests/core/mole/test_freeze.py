"""freeze(): the LoRA acts as the mixture does with its gates held at their mean."""

from __future__ import annotations

import json

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import MergeError
from legomole.core.layers.keymap import ParameterSlice
from legomole.core.lowrank import LowRank
from legomole.core.merge.methods import METHODS
from legomole.core.mole.attach import attach
from legomole.core.mole.bank import Bank
from legomole.core.mole.freeze import freeze
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record
from torch import nn

from ..merge.pools import close
from .mixtures import lora, merged, trained
from .models import D, InPlace, Transformer, UNet, call, inputs

CONCAT = METHODS["concat"]()


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def run(model: nn.Module, mixture: Mixture, passes: int = 3) -> tuple[Bank, Record]:
    record = Record()
    with attach(model, mixture) as at, at.watch(record):
        for seed in range(passes):
            call(model, *inputs(model, seed=seed))
    return at.bank, record


@pytest.mark.parametrize("make", [Transformer, UNet, InPlace])
@pytest.mark.parametrize("reads", ["text", "experts"])
def test_equals_the_mixture_at_its_mean(make, reads):
    model = make()
    experts = lora(model, 1), lora(model, 2, 3)
    mixture = trained(model, experts, GateSettings(reads=reads), strengths=(0.8, -0.6), scale=1.1)
    bank, record = run(model, mixture)
    frozen = freeze(mixture, bank, record, CONCAT).adapter
    mean = record.mean()
    expected = {}  # by hand: every module of an expert times the mean gate of its scope
    for i, strength in enumerate((0.8 * 1.1, -0.6 * 1.1)):
        for name, part in experts[i].modules.items():
            delta = strength * float(mean[bank.scopes[name].name][i]) * part.delta()
            expected[name] = expected.get(name, 0) + delta
    assert frozen.modules.keys() == expected.keys()
    for name, part in frozen.modules.items():
        assert close(part.delta(), expected[name])
    x, text = inputs(model)
    by_weights = call(merged(model, (frozen,), (1.0,)), x, text)
    with attach(model, Mixture((frozen,))):
        assert close(call(model, x, text), by_weights)


def test_of_a_network_gate_equals_gates_held():
    model = Transformer()
    mixture = trained(model, (lora(model, 1), lora(model, 2)), GateSettings(granularity="network"))
    bank, record = run(model, mixture)
    frozen = freeze(mixture, bank, record, CONCAT)
    x, text = inputs(model)
    with attach(model, mixture) as at, at.hold(record.mean()[""]):
        held = model(x, text)
    assert close(merged(model, (frozen.adapter,), (1.0,))(x, text), held)
    note = frozen.report.notes[-1]
    for i, value in enumerate(record.mean()[""].tolist()):
        assert f"adapter {value:.3g} (varied by {record.spread()[''][i]:.2g})" in note
    assert "no longer follow the prompt" in note


def test_modules_whose_names_have_brackets():
    """A host's names for rows of a fused layer contain characters that are special in glob patterns."""
    model = InPlace(1)
    g = torch.Generator().manual_seed(0)
    where = "double_blocks.0.img.qkv"
    targets = {f"{where}[{i}:{i + D}]": ParameterSlice(where, i, i + D) for i in (0, D)}
    low = LowRank(torch.randn(2, D, generator=g), torch.randn(D, 2, generator=g))
    adapter = Adapter(dict.fromkeys(targets, low))
    mixture = Mixture((adapter, adapter), GateSet(2, GateSettings(activation="softmax")), targets=targets)
    bank, record = run(model, mixture)
    frozen = freeze(mixture, bank, record, CONCAT).adapter
    assert frozen.modules.keys() == targets.keys()
    for part in frozen.modules.values():
        assert close(part.delta(), low.delta())  # shares of one half for each


def test_other_losses_are_reported():
    model = Transformer(1)
    expert = Adapter(lora(model, 1).modules, diffs={"inp.bias": torch.ones(D)}, source=Source("a.safetensors"))
    mixture = trained(model, (expert, lora(model, 2)), GateSettings(granularity="block"), "output")
    notes = " / ".join(freeze(mixture, *run(model, mixture), CONCAT).report.notes)
    assert "mixed outputs of blocks" in notes
    assert "merged without a gate: inp.bias of a: a difference" in notes


def test_text_encoder_parts_have_weights_of_their_own():
    model = Transformer(1)
    te = {"text_encoder.q": LowRank(torch.ones(1, 3), torch.ones(3, 1))}
    mixture = Mixture((Adapter({**lora(model, 1).modules, **te}),), strengths=(0.5,))
    ran = run(model, mixture)
    for weights, size in ((None, 0.5), ([2.0], 2.0)):
        frozen = freeze(mixture, *ran, CONCAT, text_encoder_weights=weights).adapter
        assert close(frozen.modules["text_encoder.q"].delta(), size * torch.ones(3, 3))


def test_bad_input():
    model = Transformer()
    mixture = Mixture((lora(model, 1), lora(model, 2)), GateSet(2, GateSettings(reads="hidden")))
    bank, record = run(model, mixture)
    with pytest.raises(MergeError, match="No gate values"):
        freeze(mixture, bank, Record(), CONCAT)
    partial = Record(passes=[{"blocks.0.ff": torch.ones(1, 2)}])
    with pytest.raises(MergeError, match=r"not recorded[\s\S]*blocks\.0\.attn[\s\S]*whole run"):
        freeze(mixture, bank, partial, CONCAT)
    for one in record.passes:
        one.update({scope: torch.zeros(1, 2) for scope in one})
    with pytest.raises(MergeError, match="every weight is 0"):
        freeze(mixture, bank, record, CONCAT)


def test_peft_settings_that_depend_on_the_base_model_are_kept():
    """Settings that the LoRAs' configurations share, e.g. transposed layers; PEFT would correct them with a warning."""
    model = Transformer()
    configs = (
        {"peft_type": "LORA", "fan_in_fan_out": True, "r": 2},
        {"peft_type": "LORA", "fan_in_fan_out": True, "r": 3},
    )
    experts = [
        Adapter(lora(model, i).modules, metadata={"adapter_config": json.dumps(config)})
        for i, config in enumerate(configs)
    ]
    mixture = Mixture(tuple(experts))
    bank, record = run(model, mixture, 1)
    config = json.loads(freeze(mixture, bank, record, CONCAT).adapter.metadata["adapter_config"])
    assert config == {"peft_type": "LORA", "fan_in_fan_out": True}
    plain = Mixture((lora(model, 1),))
    assert "adapter_config" not in freeze(plain, *run(model, plain, 1), CONCAT).adapter.metadata
