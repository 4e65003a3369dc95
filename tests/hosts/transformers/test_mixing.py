"""Mixtures on transformers models: merged weights, loops by hand, and generation with and without a cache."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path
from typing import Any

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
from legomole.core.mole.gates import Gate, GateSet, GateSettings, balance_loss
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record
from legomole.hosts.transformers.mixing import experts, mixed
from legomole.hosts.transformers.texts import _own
from torch import Tensor, nn

from ...core.mole.mixtures import gradients, untouched
from ...core.mole.test_tokens import Loop
from .tiny_language import (
    CAUSAL,
    MODELS,
    Opened,
    generate,
    gpt2,
    llama,
    lora,
    merged,
    mixture,
    opened,
    padded,
    prompts,
)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")  # the library's own

READS = ("hidden", "experts", "token")
# what transformers calls the cache: since 5.24, and before
CACHE = "cache" if "cache" in inspect.signature(transformers.LlamaForCausalLM.forward).parameters else "past_key_values"


def settings(reads: str, granularity: str = "layer", activation: str = "sigmoid") -> GateSettings:
    return GateSettings(reads=reads, granularity=granularity, activation=activation)


def close(a: Tensor, b: Tensor, tolerance: float = 1e-4) -> bool:
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def logits(model: Any, **inputs: Tensor) -> Tensor:
    return model(**inputs).logits


class TestHeld:
    @pytest.mark.parametrize("kind", MODELS)
    def test_equals_merged_weights(self, kind):
        model = MODELS[kind]()
        pair = experts(model, [lora(model, 1), lora(model, 2, 3)])
        (ids,) = prompts(5)
        base = logits(model, input_ids=ids)
        with mixed(model, Mixture(tuple(pair), strengths=(0.5, 2.0))) as at, at.hold([0.6, -0.4]):
            found = logits(model, input_ids=ids)
        assert close(found, logits(merged(model, pair, (0.3, -0.8)), input_ids=ids))
        assert not close(found, base, 1e-2)
        assert torch.equal(logits(model, input_ids=ids), base)

    @pytest.mark.parametrize("kind", CAUSAL)
    def test_rows_of_a_batch_have_gates_of_their_own(self, kind):
        model = MODELS[kind]()
        pair = lora(model, 1), lora(model, 2)
        ids = torch.cat(prompts(5, 5, 5))
        values = torch.tensor([[1.0, 0.0], [0.2, 1.3], [0.0, 0.0]])
        with mixed(model, Mixture(pair)) as at, at.hold(values):
            found = logits(model, input_ids=ids)
        for row in range(3):
            assert close(found[row : row + 1], logits(merged(model, pair, values[row].tolist()), input_ids=ids[[row]]))

    def test_untrained_gates_are_the_sum_in_three_lines(self):
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
        """A quantised base: weights of bytes, of which nobody may make sense."""

        class Bytes(nn.Module):
            def __init__(self, layer: nn.Linear) -> None:
                super().__init__()
                self.size = layer.weight.abs().max() / 127
                self.weight = nn.Parameter((layer.weight / self.size).round().to(torch.int8), requires_grad=False)

            def forward(self, x: Tensor) -> Tensor:
                return x @ (self.size * self.weight.float()).mT

        model = llama()
        pair = lora(model, 1), lora(model, 2)
        plain = copy.deepcopy(model)
        for name in pair[0].modules:
            parent, _, child = name.rpartition(".")
            own = Bytes(model.get_submodule(name))
            setattr(model.get_submodule(parent), child, own)
            plain.get_submodule(name).weight.copy_(own.size * own.weight.float())
        before = {name: p.clone() for name, p in model.named_parameters()}
        (ids,) = prompts(5)
        with mixed(model, Mixture(pair)) as at, at.hold([0.5, 1.5]):
            assert close(logits(model, input_ids=ids), logits(merged(plain, pair, (0.5, 1.5)), input_ids=ids))
        assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())

    def test_a_mixture_leaves_no_trace(self):
        model = llama()
        mix = mixture(model, settings("hidden"))
        with mixed(model, mix):
            assert "generate" in model.__dict__
        assert untouched(model)
        assert "generate" not in model.__dict__
        model.generate = before = model.generate
        mixed(model, mix).detach()
        assert model.generate is before

    def test_a_deep_copy_generates_for_itself(self):
        model = llama()
        inputs = padded(prompts(4, 6), "left")
        with mixed(model, mixture(model, settings("hidden"))):
            expected = generate(model, inputs)
            twin = copy.deepcopy(model)
            twin.lm_head.weight.copy_(-twin.lm_head.weight)
            assert torch.equal(generate(model, inputs), expected)
            assert not torch.equal(generate(twin, inputs), expected)


class TestTokens:
    @pytest.mark.parametrize("granularity", ["block", "layer", "matrix"])
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_equals_a_loop_by_hand(self, kind, granularity):
        model = MODELS[kind]()
        mix = mixture(model, settings("token", granularity, "softmax"))
        inputs = padded(prompts(3, 5), "right")
        with mixed(model, mix) as at:
            found = logits(model, **inputs)
            scope_of = {path: scope.name for path, scope in at.bank.scopes.items()}
            first = {scope: layer or scope for scope, layer in at.layers_read.items()}
        assert close(found, logits(Loop(model, mix, scope_of, first).model, **inputs))

    @pytest.mark.parametrize("granularity", ["network", "layer"])
    def test_no_position_looks_ahead(self, granularity):
        model = llama()
        ids, other = prompts(7)[0], prompts(7, seed=1)[0]
        other[:, :4] = ids[:, :4]
        with mixed(model, mixture(model, settings("token", granularity))):
            one, two = logits(model, input_ids=ids), logits(model, input_ids=other)
        assert close(one[:, :4], two[:, :4], 1e-5)
        assert not close(one[:, 4:], two[:, 4:], 1e-2)


class TestGenerate:
    @pytest.mark.parametrize("granularity", ["network", "block", "layer", "matrix"])
    @pytest.mark.parametrize("reads", ["hidden", "experts"])
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_the_prompts_gates_are_kept(self, kind, reads, granularity):
        """Each row of a padded batch as it is generated alone by a model with the row's own gates in its weights."""
        model = MODELS[kind]()
        mix = mixture(model, settings(reads, granularity))
        texts = prompts(3, 6)
        expected, values = [], []
        for text in texts:
            gates = opened(model, mix, input_ids=text)
            values.append(torch.cat(list(gates.values())))
            expected.append(
                generate(merged(model, mix.experts, {n: g[0] for n, g in gates.items()}), {"input_ids": text})
            )
        with mixed(model, mix):
            found = generate(model, padded(texts, "left"))
            again = generate(model, padded(texts, "left"), use_cache=False)
        assert torch.equal(found, torch.cat(expected))
        assert torch.equal(again, found)
        assert float((values[0] - values[1]).abs().mean()) > 0.05
        assert len({*found.flatten().tolist()}) > 2

    @pytest.mark.parametrize("reads", READS)
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_equals_repeated_full_passes(self, kind, reads):
        model = MODELS[kind]()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mixture(model, settings(reads))) as at:
            found = generate(model, inputs)
            ids, mask = inputs["input_ids"], inputs["attention_mask"]
            with at.prompt(mask.bool()):
                for _ in range(8):
                    positions = (mask.cumsum(1) - 1).clamp_min(0)
                    scores = model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
                    ids = torch.cat([ids, scores[:, -1:].argmax(-1)], 1)
                    mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        assert torch.equal(found, ids[:, 6:])

    @pytest.mark.parametrize("reads", READS)
    def test_beams_and_other_caches(self, reads):
        model = llama()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mixture(model, settings(reads))):
            expected = generate(model, inputs)
            assert torch.equal(generate(model, inputs, cache_implementation="static"), expected)
            beams = generate(model, inputs, num_beams=3)
            assert torch.equal(beams, generate(model, inputs, num_beams=3, use_cache=False))
        assert not torch.equal(beams, expected)

    def test_prompts_in_pieces_are_for_gates_per_token(self):
        model = llama()
        inputs = padded(prompts(6, 6), "left")
        with mixed(model, mixture(model, settings("token"))):
            assert torch.equal(generate(model, inputs, prefill_chunk_size=4), generate(model, inputs))
        with mixed(model, mixture(model, settings("hidden"))):
            with pytest.raises(MergeError, match=r"in pieces[\s\S]*prefill_chunk_size=4"):
                generate(model, inputs, prefill_chunk_size=4)
            config = transformers.GenerationConfig(prefill_chunk_size=2, max_new_tokens=2)
            with pytest.raises(MergeError, match="in pieces"):
                model.generate(**inputs, generation_config=config)

    def test_output_mixing_without_a_cache(self):
        """Held at one LoRA, the block under that LoRA alone."""
        model = llama()
        mix = mixture(model, settings("token", "block"), "output")
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mix) as at:
            with at.hold([1.0, 0.0]):
                found = generate(model, inputs, use_cache=False)
            with pytest.raises(MergeError, match="key-value cache"):
                generate(model, inputs)
            free = generate(model, inputs, use_cache=False)
        assert torch.equal(found, generate(merged(model, mix.experts, (1, 0)), inputs))
        assert not torch.equal(free, found)

    def test_gates_stay_with_the_cache(self):
        """Two conversations in turn, step by step by hand; a new one starts anew."""
        model = llama()
        one, two = prompts(4, 6)
        with mixed(model, mixture(model, settings("hidden"))) as at:
            expected = [generate(model, {"input_ids": text}, 3) for text in (one, two)]
            caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
            texts, found = [one, two], [[], []]
            for _ in range(3):
                for i in range(2):
                    scores = model(texts[i], **{CACHE: caches[i]}, use_cache=True).logits
                    texts[i] = scores[:, -1:].argmax(-1)
                    found[i].append(texts[i])
            own = at._gate_values.text_reader
            assert len(own.known) == 2
            del caches
            assert len(own.known) == 0
        assert [torch.cat(tokens, 1).tolist() for tokens in found] == [tokens.tolist() for tokens in expected]

    def test_a_cache_the_model_makes_is_known_too(self):
        model = gpt2()
        (text,) = prompts(5)
        with mixed(model, mixture(model, settings("hidden"))):
            expected = generate(model, {"input_ids": text}, 2)
            first = model(text, use_cache=True)
            token = first.logits[:, -1:].argmax(-1)
            second = model(token, **{CACHE: first[CACHE]}, use_cache=True).logits[:, -1:].argmax(-1)
        assert torch.equal(torch.cat([token, second], 1), expected)

    def test_caches_of_others_are_refused(self):
        model = llama()
        ids = torch.cat(prompts(5, 5))
        mix = mixture(model, settings("hidden"))
        before = model(ids, use_cache=True)[CACHE]
        with mixed(model, mix):
            with pytest.raises(MergeError, match=r"do not know the prompt[\s\S]*inside the with block"):
                model(ids[:, :1], **{CACHE: before})
            cache = model(ids, use_cache=True)[CACHE]
            cache.batch_select_indices(torch.tensor([0]))
            with pytest.raises(MergeError, match=r"another number of texts[\s\S]*expected: +2[\s\S]*found: +1"):
                model(ids[:1, :1], **{CACHE: cache})
        with mixed(model, mixture(model, settings("token"))):
            model(ids[:, :1], **{CACHE: before})  # they read nothing of the prompt


class TestPadding:
    @pytest.mark.parametrize("side", ["left", "right"])
    @pytest.mark.parametrize("reads", READS)
    @pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
    def test_padded_rows_equal_rows_alone(self, kind, reads, side):
        model = MODELS[kind]()
        mix = mixture(model, settings(reads))
        texts = prompts(3, 6)
        inputs = padded(texts, side)
        own = inputs["attention_mask"]
        if kind != "llama":  # positions are learnt, not relative
            inputs["position_ids"] = (own.cumsum(1) - 1).clamp_min(0)
        with mixed(model, mix):
            together = model(**inputs, output_hidden_states=True).hidden_states[-1]
            for row, text in enumerate(texts):
                alone = model(text, output_hidden_states=True).hidden_states[-1]
                assert close(together[row][own[row].bool()], alone[0])

    @pytest.mark.parametrize("form", ["plain", "seen", "added", "by kind of layer", "none"])
    def test_every_form_of_a_mask(self, form):
        """Of a text that is padded on the left, three tokens of which two are new, in a cache with room for five."""
        own = torch.tensor([[0, 1, 1], [1, 1, 1]]).bool()
        seen = torch.zeros(2, 1, 2, 5, dtype=torch.bool)
        seen[:, 0, 0, :2], seen[:, 0, 1, :3] = own[:, :2], own
        added = torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)
        mask = {"plain": own.long(), "seen": seen, "added": added, "by kind of layer": {"full_attention": seen}}.get(
            form
        )
        expected = [[True, True], [True, True]] if form == "none" else own[:, 1:].tolist()
        assert _own(mask, 2, 2, 1).tolist() == expected
        if form in ("plain", "seen", "added"):
            whole = own.long() if form == "plain" else mask
            assert _own(whole, 2, 3, 0).tolist() == own.tolist()

    def test_embeddings_in_place_of_tokens(self):
        model = llama()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mixture(model, settings("hidden"))):
            expected = generate(model, inputs)
            found = model.generate(
                inputs_embeds=model.get_input_embeddings()(inputs["input_ids"]),
                attention_mask=inputs["attention_mask"], max_new_tokens=8, min_new_tokens=8, do_sample=False,
            )  # fmt: skip
        assert torch.equal(found, expected)

    def test_labels_tell_where_the_prompt_ends(self):
        model = llama()
        mix = mixture(model, settings("hidden"))
        inputs = padded(prompts(4, 7), "left")
        labels = torch.where(inputs["attention_mask"].bool(), inputs["input_ids"], -100)
        labels[:, :5] = -100  # the prompts are of 2 and 5 tokens
        ends = torch.zeros(2, 7, dtype=torch.bool)
        ends[:, :5] = True
        whole = opened(model, mix, **inputs)
        with_labels = opened(model, mix, **inputs, labels=labels)
        seen = Opened()
        with mixed(model, mix) as at, at.watch(seen), at.prompt(ends):
            model(**inputs)
            prompt = {name: seen.passes[0][at.bank.scopes[path].name] for name, path in at.bank.paths.items()}
        for name, value in prompt.items():
            assert close(with_labels[name], value)
            assert not close(with_labels[name], whole[name], 1e-3)

    def test_without_a_prompt_they_read_the_first_token(self):
        model = llama()
        mix = mixture(model, settings("hidden"))
        inputs = padded(prompts(4, 7), "left")
        found = opened(model, mix, **inputs, labels=inputs["input_ids"])
        first = opened(model, mix, input_ids=torch.stack([inputs["input_ids"][0, 3:4], inputs["input_ids"][1, :1]]))
        assert all(close(found[name], value) for name, value in first.items())


def checkpointed(model: Any, how: str) -> Any:
    model.train()
    if how == "model":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model


class TestGradientCheckpointing:
    @pytest.mark.parametrize("granularity", ["network", "block", "layer"])
    @pytest.mark.parametrize("reads", READS)
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_gradients_are_equal(self, kind, reads, granularity):
        """Two passes before the backward one, of other texts: each part runs again with the gates of its own."""
        found = []
        for how in ("plain", "ours", "model"):
            if how == "ours" and granularity == "network":
                continue
            model = checkpointed(MODELS[kind]().double(), how)
            mix = mixture(model, settings(reads, granularity, "softmax-null"))
            batches = [padded(prompts(3, 6), "right"), padded(prompts(5, 2, seed=1), "right")]
            with mixed(model, mix, checkpointing=how == "ours") as at, torch.enable_grad():
                at.bank.gates.double()

                def loss(model=model, at=at, batches=batches) -> Tensor:
                    total = torch.zeros((), dtype=torch.float64)
                    for inputs in batches:
                        seen = Opened()
                        with at.watch(seen):
                            scores = model(**inputs, use_cache=False).logits.log_softmax(-1)
                        total = total - scores[:, 0, 3].mean() + 0.1 * balance_loss(list(seen.passes[0].values()))
                    return total

                found.append(gradients(at, loss))
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            for name, gradient in found[0].items():
                assert torch.allclose(gradient, other[name], rtol=1e-8, atol=1e-12), name
        assert all(float(gradient.abs().max()) > 0 for gradient in found[0].values())

    def test_parts_do_run_again(self):
        model = checkpointed(llama(), "model")
        runs: list[int] = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
        with mixed(model, mixture(model, settings("hidden"))) as at, torch.enable_grad():
            gradients(at, lambda: model(prompts(4)[0], use_cache=False).logits.square().mean())
            assert len(runs) == 2
            late = model(prompts(4)[0], use_cache=False).logits.square().mean()
        with torch.enable_grad(), pytest.raises(MergeError, match="detached before the backward pass"):
            late.backward()

    def test_what_the_model_checkpoints_with_is_put_back(self):
        model = checkpointed(llama(), "model")
        before = [m._gradient_checkpointing_func for m in model.model.layers]
        with mixed(model, mixture(model, settings("hidden"))), torch.enable_grad():
            model(prompts(4)[0], use_cache=False)
            assert model.model.layers[0]._gradient_checkpointing_func is not before[0]
        assert all(m._gradient_checkpointing_func is f for m, f in zip(model.model.layers, before, strict=True))

    def test_the_other_kind_is_refused(self):
        model = llama().train()
        mix = mixture(model, settings("hidden"))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with (
            mixed(model, mix),
            torch.enable_grad(),
            pytest.raises(MergeError, match=r"no gradients[\s\S]*use_reentrant': False"),
        ):
            model(prompts(4)[0], use_cache=False)


class TestFreeze:
    @pytest.mark.parametrize("reads", ["hidden", "token"])
    @pytest.mark.parametrize("kind", CAUSAL)
    def test_one_adapter_in_peft(self, kind, reads, tmp_path: Path):
        """It acts as the mixture does with every gate at its mean over the run."""
        peft = pytest.importorskip("peft")
        model = MODELS[kind]()
        mix = mixture(model, settings(reads))
        record = Record()
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mix) as at, at.watch(record):
            generate(model, inputs, 3)
        config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "fan_in_fan_out": kind == "gpt2"}
        named = [Adapter(e.modules, metadata={"adapter_config": json.dumps(config)}) for e in mix.experts]
        frozen = freeze(Mixture(tuple(named), mix.gates), at.bank, record, METHODS["concat"]()).adapter
        legomole.save(frozen, tmp_path / "frozen", format="peft")
        mean = {name: record.mean()[at.bank.scopes[path].name] for name, path in at.bank.paths.items()}
        assert record.table().shape[0] == 3
        constant = Mixture(mix.experts, held_at(record.mean(), settings("hidden")))
        with mixed(model, constant):
            expected = logits(model, **inputs)
        assert close(expected, logits(merged(model, mix.experts, mean), **inputs))
        theirs = peft.PeftModel.from_pretrained(MODELS[kind](), str(tmp_path / "frozen")).eval()
        assert close(theirs(**inputs).logits, expected)


def held_at(values: dict[str, Tensor], chosen: GateSettings) -> GateSet:
    """Gates that are always at these values: `W` = 0, ``ceiling * sigmoid(b)`` the value."""
    gates: dict[str, Gate] = {}
    for scope, value in values.items():
        gates[scope] = gate = Gate(16, 2, chosen)
        gate.bias.copy_((value / chosen.ceiling).logit())
    return GateSet(2, chosen, gates)


class TestMasks:
    @pytest.mark.parametrize("reads", READS)
    def test_a_lora_that_is_switched_off(self, reads):
        """Softmax over one is 1: the other acts alone."""
        model = llama()
        mix = mixture(model, settings(reads, activation="softmax"))
        inputs = padded(prompts(3, 6), "left")
        with mixed(model, mix.without(0)):
            found = generate(model, inputs)
        assert torch.equal(found, generate(merged(model, mix.experts[1:], (1,)), inputs))


class TestExperts:
    def test_pefts_folders(self, tmp_path: Path):
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
        own = lora(whole, 1)
        (bare,) = experts(whole.model, [own])
        assert "layers.0.self_attn.q_proj" in bare.modules
        (back,) = experts(whole, [bare])
        assert back.modules.keys() == own.modules.keys()
        (ids,) = prompts(4)
        with mixed(whole.model, Mixture((bare,))):
            found = whole.model(ids).last_hidden_state
        assert close(found, merged(whole, [own], (1,)).model(ids).last_hidden_state)

    def test_what_is_refused(self):
        model = llama()
        part = LowRank(torch.ones(1, 16), torch.ones(16, 1))
        with pytest.raises(MergeError, match=r"another base model[\s\S]*LlamaForCausalLM[\s\S]*model\.layers\.7"):
            experts(model, [Adapter({"model.layers.7.mlp.up_proj": part})])
        with pytest.raises(MergeError, match="embedding"):
            experts(model, [Adapter({"model.embed_tokens.lora_embedding": part})])
        partly = Adapter(lora(model, 1).modules, diffs={"model.layers.0.self_attn.q_proj.bias": torch.ones(16)})
        with pytest.warns(UserWarning, match=r"1 parts such as .*q_proj\.bias"):
            experts(model, [partly])

    def test_gates_with_nothing_to_read(self):
        model = llama()
        pair = lora(model, 1), lora(model, 2)
        for reads in ("text", "flat"):
            gates = GateSet(2, settings(reads), {"model.layers.0.mlp": Gate(16, 2, settings(reads))})
            with pytest.raises(MergeError, match=rf"reads={reads}[\s\S]*hidden"):
                mixed(model, Mixture(pair, gates))

    def test_an_encoder_with_a_decoder(self):
        config = transformers.T5Config(vocab_size=12, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
        model = transformers.T5ForConditionalGeneration(config)
        part = LowRank(torch.ones(1, 8), torch.ones(8, 1))
        with pytest.raises(MergeError, match="two texts at once"):
            mixed(model, Mixture((Adapter({"encoder.block.0.layer.0.SelfAttention.q": part}),)))
