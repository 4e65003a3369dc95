"""Bank: the layers that the experts' modules change, and errors for modules without a layer."""

from __future__ import annotations

import copy

import pytest
import torch
from legomole.core.adapter import Adapter, Source
from legomole.core.errors import MergeError
from legomole.core.layers.keymap import ParameterSlice
from legomole.core.lowrank import LowRank
from legomole.core.mole.bank import Bank
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from torch import nn

from .mixtures import lora, random_detector
from .models import InPlace, Transformer, UNet


def renamed(adapter: Adapter, prefix: str, path: str = "") -> Adapter:
    return Adapter({prefix + name: part for name, part in adapter.modules.items()}, source=Source(path=path))


def test_modules_are_found_by_path_and_behind_the_usual_prefixes():
    model = Transformer()
    plain, prefixed = lora(model, 0), renamed(lora(model, 1), "diffusion_model.")
    bank = Bank(model, Mixture((plain, prefixed)))
    assert bank.paths["blocks.0.ff.0"] == bank.paths["diffusion_model.blocks.0.ff.0"] == "blocks.0.ff.0"
    assert bank.stacks["blocks.0.ff.0"].owner.tolist() == [0, 0, 1, 1]
    assert len(bank.stacks) == len(plain.modules)
    for prefix in ("transformer.", "unet.", "base_model.model."):
        assert set(Bank(model, Mixture((renamed(plain, prefix),))).stacks) == set(bank.stacks)


def test_targets_may_be_any_layer():
    model, low = InPlace(), LowRank(torch.randn(1, 8), torch.randn(8, 1))
    targets = {f"to_{x}": ParameterSlice("double_blocks.0.img.qkv", 8 * i, 8 * i + 8) for i, x in enumerate("qkv")}
    bank = Bank(model, Mixture((Adapter({"to_k": low, "to_v": low}),), targets=targets))
    (stack,) = bank.stacks.values()
    assert [group[:2] for group in stack.groups] == [(8, 16), (16, 24)]
    assert bank.paths == {"to_k": "double_blocks.0.img.qkv", "to_v": "double_blocks.0.img.qkv"}


def test_another_architecture():
    model = Transformer()
    foreign = renamed(lora(UNet(), 0, names=["conv_in", "conv_out"]), "", "folder/style.safetensors")
    with pytest.raises(
        MergeError,
        match=r"No layer of the LoRA[\s\S]*folder/style[\s\S]*blocks\.0\.attn[\s\S]*2 layers[\s\S]*`legomole\.experts`",
    ):
        Bank(model, Mixture((foreign,)))
    deeper = renamed(lora(Transformer(3), 0), "", "deep.safetensors")
    with pytest.raises(MergeError, match=r"model lacks layers[\s\S]*deep[\s\S]*6 layers such as blocks\.2\.attn"):
        Bank(model, Mixture((lora(model, 0), deeper)))
    with pytest.raises(MergeError, match=r"model lacks layers[\s\S]*double_blocks\.9"):
        Bank(model, Mixture((lora(model, 0),), targets={"inp": ParameterSlice("double_blocks.9", 0, 8)}))


def test_another_shape_under_the_same_name():
    for shape in ((7, 4), (8, 3)):  # fewer rows, fewer columns
        low = LowRank(torch.randn(1, shape[1]), torch.randn(shape[0], 1))
        with pytest.raises(MergeError, match=rf"different shape[\s\S]*\(8, 4\)[\s\S]*\({shape[0]}, {shape[1]}\)"):
            Bank(Transformer(), Mixture((Adapter({"inp": low}),)))


def test_parts_that_cannot_be_mixed_are_listed():
    model, low = Transformer(), LowRank(torch.randn(1, 8), torch.randn(8, 1))
    adapter = Adapter(
        {**lora(model, 0).modules, "lora_te_text_model_0": low},
        diffs={"inp.bias": torch.zeros(8)},
        extras={"emb": torch.zeros(2)},
        source=Source(path="x.safetensors"),
    )
    left_out = Bank(model, Mixture((adapter,))).left_out
    assert left_out == (
        "lora_te_text_model_0 of x: it belongs to a text encoder",
        "inp.bias of x: a difference has no low-rank factors to gate",
        "emb of x: a replaced value has no low-rank factors to gate",
    )
    with pytest.raises(MergeError, match=r"No layer of the LoRA[\s\S]*text encoder layers only"):
        Bank(model, Mixture((Adapter({"lora_te_text_model_0": low}),)))


class TestGates:
    settings = GateSettings(granularity="block", reads="hidden")

    def gates(self, *names: str) -> GateSet:
        return GateSet(1, self.settings, {name: Gate(2, 1, self.settings) for name in names})

    def test_of_other_parts_are_refused(self):
        model = Transformer()
        with pytest.raises(
            MergeError, match=r"other parts of a model[\s\S]*blocks\.0[\s\S]*2 gates such as a\.0, a\.1"
        ):
            Bank(model, Mixture((lora(model, 0),), self.gates("a.0", "a.1")))

    def test_of_scopes_that_only_a_switched_off_expert_changes_are_dropped(self):
        model = Transformer()
        a, b = lora(model, 0, names=["blocks.0.ff.0"]), lora(model, 1, names=["blocks.1.ff.0"])
        gate = Gate(2, 2, self.settings)
        gates = GateSet(2, self.settings, {"blocks.0": gate, "blocks.1": copy.deepcopy(gate)})
        bank = Bank(model, Mixture((a, b), gates).without(1))
        assert bank.gates.names == ("blocks.0",)

    def test_are_a_copy(self):
        model = Transformer()
        mixture = Mixture((lora(model, 0),), self.gates("blocks.0"))
        bank = Bank(model, mixture)
        with torch.no_grad():
            bank.gates["blocks.0"].bias.fill_(7.0)
        assert mixture.gates["blocks.0"].bias.tolist() != [7.0]

    def test_the_detector_is_copied_and_moves_with_them(self):
        model, detector = Transformer(), random_detector(1, 6)
        settings = GateSettings(granularity="block")
        gates = GateSet(1, settings, {"blocks.0": Gate(1, 1, settings, owner=torch.arange(1))}, detector)
        bank = Bank(model, Mixture((lora(model, 0),), gates))
        assert bank.gates.detector is not None
        assert bank.gates.detector is not detector
        assert torch.equal(bank.gates.detector.weight, detector.weight)
        assert bank.to("meta").gates.detector.weight.device.type == "meta"
        assert detector.weight.device.type == "cpu"

    def test_are_the_only_parameters_with_gradients(self):
        model = Transformer()
        bank = Bank(model, Mixture((lora(model, 0),), self.gates("blocks.0")))
        assert {id(p) for p in bank.parameters()} == {id(p) for p in bank.gates.parameters()}
        assert [tuple(p.shape) for p in bank.parameters_of_gates] == [(1, 2), (1,)]  # no temperature for sigmoids


def test_blocks():
    model = UNet()
    bank = Bank(model, Mixture((lora(model, 0),)))  # granularity layer
    inner = "down_blocks.0.attentions.0.transformer_blocks.0"
    assert bank.blocks == {
        "down_blocks.0": ["down_blocks.0.downsamplers"],
        "down_blocks.0.attentions.0": ["down_blocks.0.attentions.0"],
        inner: [f"{inner}.attn", f"{inner}.ff"],
        "down_blocks.0.resnets.0": ["down_blocks.0.resnets.0"],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_factors_take_the_dtype_of_their_layer(dtype):
    model = Transformer().to(dtype)
    bank = Bank(model, Mixture((lora(model, 0),)))
    assert {stack.D.dtype for stack in bank.stacks.values()} == {dtype}
    assert {s.D.dtype for s in Bank(model, Mixture((lora(model, 0),)), dtype=torch.float32).stacks.values()} == {
        torch.float32
    }


def test_factors_of_an_eight_bit_layer_keep_their_dtype():
    model = nn.ModuleDict({"a": nn.Linear(4, 4)}).requires_grad_(False)
    model["a"].weight.data = model["a"].weight.data.to(torch.float8_e4m3fn)
    low = LowRank(torch.randn(2, 4).bfloat16(), torch.randn(4, 2).bfloat16())
    assert Bank(model, Mixture((Adapter({"a": low}),))).stacks["a"].D.dtype == torch.bfloat16


def test_moves_as_a_module():
    model = Transformer()
    bank = Bank(model, Mixture((lora(model, 0),))).to("meta")
    assert {t.device.type for t in (*bank.parameters(), *bank.buffers())} == {"meta"}
    assert bank.stacks["inp"].D.device.type == "meta"
