"""attach(): an attached mixture in use, and errors."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import Gate, GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.stack import Stack
from torch import Tensor, nn

from ..merge.pools import close
from .kinds import settings
from .mixtures import Values, lora, merged, random_detector, random_gates, trained, untouched
from .models import FEATURES, D, Transformer, inputs

pytestmark = pytest.mark.usefixtures("no_gradients")


class TestAttached:
    def test_a_deep_copy_works_on_its_own_weights(self):
        model = Transformer()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("hidden", "block"))
        with attach(model, mixture):
            with torch.enable_grad():
                mixed = model(x, text).detach()
            twin = copy.deepcopy(model)
            twin.blocks[1].ff[2].bias += 1.0
            twin.blocks[0].attn.to_q.weight.zero_()
            assert torch.equal(model(x, text), mixed)
            changed = twin(x, text)
        assert untouched(model)
        assert torch.equal(twin(x, text), changed)  # still mixed
        model.load_state_dict(twin.state_dict())
        with attach(model, mixture):
            assert torch.equal(model(x, text), changed)

    def test_the_signature_is_the_models_own(self):
        model = Transformer()
        before = inspect.signature(model.forward)
        with attach(model, Mixture((lora(model, 1),))), attach(model, Mixture((lora(model, 2),))):
            assert inspect.signature(model.forward) == before
            assert list(inspect.signature(model.inp.forward).parameters) == ["input"]

    def test_no_gate_values_remain_after_a_pass(self):
        """Gates of one prompt are not used for the next, and do not keep its graph alive."""
        model = Transformer()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("text"))
        with attach(model, mixture) as at:
            first = model(x, text)
            model(x, -text)
            assert torch.equal(model(x, text), first)
            assert {scope.value for scope in at._gate_values.scopes.values()} == {None}

    def test_factors_follow_the_model_to_its_device(self):
        model = Transformer()
        mixture = Mixture((lora(model, 1), lora(model, 2)))
        with attach(model, mixture):
            model.to("meta")
            assert model(*(t.to("meta") for t in inputs(model))).device.type == "meta"
        with attach(model, mixture) as at:
            assert at.bank.stacks["inp"].D.device.type == "cpu"  # an offloaded model's device is not used

    def test_layers_called_by_keyword(self):
        model = Transformer()
        x, text = inputs(model)
        model.blocks[0].ff.forward = lambda h, ff=model.blocks[0].ff: ff[2](input=ff[1](ff[0](input=h)))
        with attach(model, Mixture((lora(model, 1),))):
            found = model(x, text)
        assert close(found, merged(Transformer(), (lora(model, 1),), (1,))(x, text))

    def test_parts_that_cannot_be_mixed_are_listed(self):
        model = Transformer()
        with attach(model, Mixture((Adapter(lora(model, 1).modules, diffs={"inp.bias": torch.zeros(D)}),))) as at:
            assert at.left_out == ("inp.bias of adapter: a difference has no low-rank factors to gate",)

    def test_other_gates_may_be_used(self):
        model = Transformer()
        x, text = inputs(model)
        mixture = Mixture((lora(model, 1), lora(model, 2)), GateSet(2, settings("hidden")))
        gates = random_gates(model, mixture, mixture.gates.settings)
        with attach(model, Mixture(mixture.experts, gates)):
            expected = model(x, text)
        with attach(model, mixture) as at:
            at.use(gates)
            assert torch.equal(model(x, text), expected)
            assert at.bank.gates is gates

    def test_hold_and_watch_end_with_their_blocks(self):
        model = Transformer()
        x, text = inputs(model)
        outer, inner = Values(), Values()
        with attach(model, Mixture((lora(model, 1), lora(model, 2)))) as at, at.watch(outer), at.hold([1, 0]):
            one = model(x, text)
            with at.hold([0, 1]), at.watch(inner):
                model(x, text)
            assert torch.equal(model(x, text), one)
        assert {tuple(v[0].tolist()) for v in outer.values.values()} == {(1.0, 0.0)}
        assert {tuple(v[0].tolist()) for v in inner.values.values()} == {(0.0, 1.0)}

    @pytest.mark.parametrize("mixing", ["delta", "output"])
    @pytest.mark.parametrize("reads", ["text", "hidden", "experts"])
    def test_layers_do_no_work_while_all_gates_are_held_at_zero(self, reads: Any, mixing: Any):
        """The output is the base model's, bit for bit, and no down projection runs; gates are observed as ever."""
        model = Transformer()
        x, text = inputs(model)
        base = model(x, text)
        granularity = "block" if mixing == "output" else "layer"
        experts = lora(model, 1), lora(model, 2)
        mixture = Mixture(experts, GateSet(2, GateSettings(reads=reads, granularity=granularity)), mixing=mixing)
        values = Values()
        with attach(model, mixture) as at, at.watch(values):
            mixed = model(x, text)
            with at.hold([0.0, 0.0]), pytest.MonkeyPatch.context() as patch:
                scopes, values.values = set(values.values), {}
                patch.setattr(Stack, "down", lambda *_: pytest.fail("a down projection runs"))
                assert torch.equal(model(x, text), base)
            assert set(values.values) == scopes
            assert all(not value.any() for value in values.values.values())
            assert torch.equal(model(x, text), mixed)
            with at.hold([0.0, 1.0]):
                assert not torch.equal(model(x, text), base)

    def test_a_part_that_runs_again_has_the_gates_of_its_first_run(self):
        """Also if gates are held at 0 in between, or were held at 0 in the first run."""
        model = Transformer()
        x, text = inputs(model)
        with attach(model, Mixture((lora(model, 1), lora(model, 2)))) as at:
            for first, later in (([0.0, 0.0], [1.0, 1.0]), ([1.0, 1.0], [0.0, 0.0])):
                with at.hold(first):
                    expected = model(x, text)
                    run = at.recomputable(lambda: model.blocks[1](model.blocks[0](model.inp(x))))
                    inside = run()
                with at.hold(later):
                    assert torch.equal(run(), inside)
                    assert not torch.equal(model(x, text), expected)


class TestErrors:
    def test_text_gates_on_a_model_without_text(self):
        model = Transformer()
        x, _ = inputs(model)
        with attach(model, trained(model, (lora(model, 1), lora(model, 2)), settings("text"))):
            with pytest.raises(MergeError, match=r"got none[\s\S]*encoder_hidden_states or context[\s\S]*read hidden"):
                model(x)
            with pytest.raises(MergeError, match="got none"):  # only a part of the model runs
                model.blocks[0](model.inp.forward.inner(x))
        with attach(model, Mixture((lora(model, 1),))):
            model(x)  # untrained gates read nothing

    def test_gates_for_features_of_another_size(self):
        model = Transformer()
        x, _ = inputs(model)
        mean = settings("text-mean")
        gates = GateSet(1, mean, {"blocks.0.ff": Gate(FEATURES + 1, 1, mean)})
        with (
            attach(model, Mixture((lora(model, 1),), gates)),
            pytest.raises(
                MergeError, match=r"another size[\s\S]*blocks\.0\.ff[\s\S]*7 features[\s\S]*found: +6[\s\S]*base model"
            ),
        ):
            model(*inputs(model))
        gate = Gate(1, 1, settings("text"))
        gates = GateSet(1, settings("text"), {"blocks.0.ff": gate}, random_detector(1, FEATURES + 1))
        with (
            attach(model, Mixture((lora(model, 1),), gates)),
            pytest.raises(MergeError, match=r"another width[\s\S]*7 features[\s\S]*found: +6[\s\S]*text encoders"),
        ):
            model(*inputs(model))
        gates = GateSet(1, settings("hidden"), {"blocks.0.ff": Gate(D + 1, 1, settings("hidden"))})
        with attach(model, Mixture((lora(model, 1),), gates)), pytest.raises(MergeError, match="another size"):
            model(x)

    def test_flat_gates_at_another_image_size(self):
        model = Transformer()
        x, text = inputs(model)
        with attach(model, trained(model, (lora(model, 1), lora(model, 2)), settings("flat"))):
            model(x, text)
            with pytest.raises(MergeError, match=r"another size[\s\S]*20 features[\s\S]*found: +16[\s\S]*image size"):
                model(x[:, :4], text)

    def test_values_for_another_number_of_experts(self):
        model = Transformer()
        with (
            attach(model, Mixture((lora(model, 1),))) as at,
            pytest.raises(MergeError, match="needs a gate value"),
            at.hold([1.0, 1.0]),
        ):
            pass

    def test_a_network_gate_that_reads_a_layer_with_checkpointing(self):
        model = Transformer()
        for reads in ("hidden", "experts", "flat"):
            with pytest.raises(MergeError, match="cannot be trained with checkpointing"):
                attach(model, Mixture((lora(model, 1),), GateSet(1, settings(reads, "network"))), checkpointing=True)
        assert untouched(model)

    @pytest.mark.parametrize("name", ["past_key_values", "cache"])
    def test_a_key_value_cache_and_blocks_that_run_twice(self, name):
        class Older(Block2):
            def forward(self, hidden_states: Tensor, past_key_values: Any = None) -> Tensor:
                return super().forward(hidden_states)

        class Newer(Block2):
            def forward(self, hidden_states: Tensor, cache: Any = None) -> Tensor:
                return super().forward(hidden_states)

        model = nn.Module()
        model.blocks = nn.ModuleList([Newer() if name == "cache" else Older()])
        model.forward = lambda x, cache=None: model.blocks[0](x, cache)
        mixture = Mixture((lora(model, 1),), GateSet(1, settings("hidden", "block")), mixing="output")
        x = torch.randn(1, 3, D)
        with attach(model, mixture):
            model(x)
            with pytest.raises(MergeError, match=r"key-value cache[\s\S]*blocks\.0[\s\S]*use_cache=False"):
                model(x, object())


class Block2(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(hidden_states)))
