"""Mixtures on transformers models, compared with merged weights, with loops by hand and with PEFT."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import legomole
import transformers
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.merge.methods import METHODS
from legomole.core.mole.freeze import freeze
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record
from legomole.hosts.transformers.mixing import experts, mixed
from torch import Tensor, nn

from ...core.mole.mixtures import random_detector, untouched
from ...core.mole.test_tokens import Loop
from .tiny_language import (
    CAUSAL,
    MODELS,
    READS,
    WITHOUT_GRADIENTS,
    close,
    gate_settings,
    generate,
    gpt2,
    llama,
    logits,
    lora,
    merged,
    mixture,
    padded,
    prompts,
)

pytestmark = WITHOUT_GRADIENTS


class TestHeldGates:
    @pytest.mark.parametrize("kind", MODELS)
    def test_equals_merged_weights(self, kind):
        model = MODELS[kind]()
        pair = experts(model, [lora(model, 1), lora(model, 2, 3)])
        (ids,) = prompts(5)
        base = logits(model, input_ids=ids)
        with mixed(model, Mixture(tuple(pair), strengths=(0.5, 2.0))) as attachment, attachment.hold([0.6, -0.4]):
            found = logits(model, input_ids=ids)
        assert close(found, logits(merged(model, pair, (0.3, -0.8)), input_ids=ids))
        assert not close(found, base, 1e-2)
        assert torch.equal(logits(model, input_ids=ids), base)

    @pytest.mark.parametrize("kind", CAUSAL)
    def test_each_row_of_a_batch_has_its_own_gates(self, kind):
        model = MODELS[kind]()
        pair = lora(model, 1), lora(model, 2)
        ids = torch.cat(prompts(5, 5, 5))
        values = torch.tensor([[1.0, 0.0], [0.2, 1.3], [0.0, 0.0]])
        with mixed(model, Mixture(pair)) as attachment, attachment.hold(values):
            found = logits(model, input_ids=ids)
        for row in range(3):
            assert close(found[row : row + 1], logits(merged(model, pair, values[row].tolist()), input_ids=ids[[row]]))

    def test_untrained_gates_give_the_sum(self):
        model = llama()
        pair = [lora(model, 1), lora(model, 2)]
        inputs = padded(prompts(6), "left")
        expected = generate(merged(model, pair, (1, 1)), inputs)
        mix = legomole.Mixture(experts(model, pair))
        with mixed(model, mix):
            found = generate(model, inputs)
        assert torch.equal(found, expected)
        assert not torch.equal(generate(model, inputs), expected)

    def test_only_inputs_and_outputs_of_a_layer_are_used(self):
        """A quantised base model: its int8 weights have a meaning to their layer only."""

        class Int8Linear(nn.Module):
            def __init__(self, layer: nn.Linear) -> None:
                super().__init__()
                self.step = layer.weight.abs().max() / 127
                self.weight = nn.Parameter((layer.weight / self.step).round().to(torch.int8), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return x @ (self.step * self.weight.float()).mT

        model = llama()
        pair = lora(model, 1), lora(model, 2)
        plain = copy.deepcopy(model)
        for name in pair[0].modules:
            parent, _, child = name.rpartition(".")
            quantised = Int8Linear(model.get_submodule(name))
            setattr(model.get_submodule(parent), child, quantised)
            plain.get_submodule(name).weight.copy_(quantised.step * quantised.weight.float())
        before = {name: p.clone() for name, p in model.named_parameters()}
        (ids,) = prompts(5)
        with mixed(model, Mixture(pair)) as attachment, attachment.hold([0.5, 1.5]):
            assert close(logits(model, input_ids=ids), logits(merged(plain, pair, (0.5, 1.5)), input_ids=ids))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_detaching_restores_the_model(self):
        model = llama()
        mix = mixture(model, gate_settings("hidden"))
        with mixed(model, mix):
            assert "generate" in model.__dict__
        assert untouched(model)
        assert "generate" not in model.__dict__
        model.generate = before = model.generate
        mixed(model, mix).detach()
        assert model.generate is before

    def test_a_deep_copy_generates_with_its_own_weights(self):
        model = llama()
        inputs = padded(prompts(4, 6), "left")
        with mixed(model, mixture(model, gate_settings("hidden"))):
            expected = generate(model, inputs)
            twin = copy.deepcopy(model)
            twin.lm_head.weight.copy_(-twin.lm_head.weight)
            assert torch.equal(generate(model, inputs), expected)
            assert not torch.equal(generate(twin, inputs), expected)


class TestGatesPerToken:
    @pytest.mark.parametrize("granularity", ["block", "layer", "matrix"])
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_equals_a_loop_over_positions(self, kind, granularity):
        model = MODELS[kind]()
        mix = mixture(model, gate_settings("token", granularity, "softmax"))
        inputs = padded(prompts(3, 5), "right")
        with mixed(model, mix) as attachment:
            found = logits(model, **inputs)
            scope_of = {path: scope.name for path, scope in attachment.bank.scopes.items()}
            first = {scope: layer or scope for scope, layer in attachment.layers_read.items()}
        assert close(found, logits(Loop(model, mix, scope_of, first).model, **inputs))

    @pytest.mark.parametrize("granularity", ["network", "layer"])
    def test_no_position_looks_ahead(self, granularity):
        model = llama()
        ids, other = prompts(7)[0], prompts(7, seed=1)[0]
        other[:, :4] = ids[:, :4]
        with mixed(model, mixture(model, gate_settings("token", granularity))):
            one, two = logits(model, input_ids=ids), logits(model, input_ids=other)
        assert close(one[:, :4], two[:, :4], 1e-5)
        assert not close(one[:, 4:], two[:, 4:], 1e-2)


class TestFreeze:
    @pytest.mark.parametrize("reads", ["hidden", "token"])
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_a_frozen_mixture_loads_in_peft(self, kind, reads, tmp_path: Path):
        """It equals the mixture with every gate held at its mean over the run."""
        peft = pytest.importorskip("peft")
        model = MODELS[kind]()
        mix = mixture(model, gate_settings(reads))
        record = Record()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mix) as attachment, attachment.watch(record):
            generate(model, inputs, 3)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2"}
        named = [Adapter(e.modules, metadata={"adapter_config": json.dumps(config)}) for e in mix.experts]
        frozen = freeze(Mixture(tuple(named), mix.gates), attachment.bank, record, METHODS["concat"]()).adapter
        legomole.save(frozen, tmp_path / "frozen", format="peft")
        mean = {name: record.mean()[attachment.bank.scopes[path].name] for name, path in attachment.bank.paths.items()}
        assert record.table().shape[0] == 3
        constant = Mixture(mix.experts, constant_gates(record.mean(), gate_settings("hidden")))
        with mixed(model, constant):
            expected = logits(model, **inputs)
        assert close(expected, logits(merged(model, mix.experts, mean), **inputs))
        theirs = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path / "frozen")).eval()
        assert close(theirs(**inputs).logits, expected)


def constant_gates(values: dict[str, Tensor], chosen: GateSettings) -> GateSet:
    """Gates with these constant values: `W` = 0 and ``ceiling * sigmoid(b)`` = the value."""
    gates: dict[str, Gate] = {}
    for scope, value in values.items():
        gates[scope] = gate = Gate(16, 2, chosen)
        gate.bias.copy_((value / chosen.ceiling).logit())
    return GateSet(2, chosen, gates)


class TestSwitchedOff:
    @pytest.mark.parametrize("reads", READS)
    def test_the_other_expert_acts_alone(self, reads):
        """Its softmax gate, over one expert, is 1."""
        model = llama()
        mix = mixture(model, gate_settings(reads, activation="softmax"))
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mix.without(0)):
            found = generate(model, inputs)
        assert torch.equal(found, generate(merged(model, mix.experts[1:], (1,)), inputs))


class TestExperts:
    def test_a_folder_saved_by_peft(self, tmp_path: Path):
        peft = pytest.importorskip("peft")
        config = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["c_attn", "c_fc"], init_lora_weights=False)
        with pytest.warns(UserWarning, match="fan_in_fan_out"):
            theirs = peft.get_peft_model(gpt2(), config).eval()
        theirs.save_pretrained(str(tmp_path / "x"))
        model = gpt2()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, legomole.Mixture(experts(model, [legomole.load(tmp_path / "x")]))):
            assert close(logits(model, **inputs), theirs(**inputs).logits)
            assert torch.equal(generate(model, inputs), generate(theirs, inputs))

    def test_with_and_without_a_head(self):
        whole = llama()
        adapter = lora(whole, 1)
        (bare,) = experts(whole.model, [adapter])
        assert "layers.0.self_attn.q_proj" in bare.modules
        (back,) = experts(whole, [bare])
        assert back.modules.keys() == adapter.modules.keys()
        (ids,) = prompts(4)
        with mixed(whole.model, Mixture((bare,))):
            found = whole.model(ids).last_hidden_state
        assert close(found, merged(whole, [adapter], (1,)).model(ids).last_hidden_state)

    def test_refused_adapters(self):
        model = llama()
        part = LowRank(torch.ones(1, 16), torch.ones(16, 1))
        with pytest.raises(MergeError, match=r"another base model[\s\S]*LlamaForCausalLM[\s\S]*model\.layers\.7"):
            experts(model, [Adapter({"model.layers.7.mlp.up_proj": part})])
        with pytest.raises(MergeError, match="embedding"):
            experts(model, [Adapter({"model.embed_tokens.lora_embedding": part})])
        with pytest.raises(MergeError, match="stacked experts"):
            experts(model, [Adapter({"model.layers.0.mlp.experts.down_proj.0of2": part})])
        partly = Adapter(lora(model, 1).modules, diffs={"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
        with pytest.warns(UserWarning, match=r"1 parts such as .*q_proj\.bias"):
            experts(model, [partly])

    def test_gates_without_inputs_in_language_models(self):
        model = llama()
        pair = lora(model, 1), lora(model, 2)
        for reads in ("text", "text-mean", "flat"):
            gate = Gate(16, 2, gate_settings(reads))
            gates = GateSet(2, gate_settings(reads), {"model.layers.0.mlp": gate}, random_detector(2, 16))
            with pytest.raises(MergeError, match=rf"reads={reads}[\s\S]*hidden"):
                mixed(model, Mixture(pair, gates))

    def test_an_encoder_with_a_decoder(self):
        config = transformers.T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config)
        part = LowRank(torch.ones(1, 8), torch.ones(8, 1))
        with pytest.raises(MergeError, match="two texts at once"):
            mixed(model, Mixture((Adapter({"encoder.block.0.layer.0.SelfAttention.q": part}),)))
