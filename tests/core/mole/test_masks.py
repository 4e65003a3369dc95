"""Experts that are switched off: the mixture acts as if it had been built without them."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.layers.keymap import ParameterSlice
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import attach
from legomole.core.mole.bank import Bank
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import Gate, GateSet
from legomole.core.mole.mixture import Mixture
from torch import Tensor

from ..merge.pools import close
from .kinds import KINDS, READS, each_kind, settings
from .mixtures import Values, lora, merged, rms_normalised, trained, untouched
from .models import D, InPlace, Transformer, call, inputs

pytestmark = pytest.mark.usefixtures("no_gradients")


class TestMasks:
    @pytest.mark.parametrize(
        ("reads", "mixing", "granularity", "activation"),
        [(*kind, "softmax") for kind in KINDS]
        + [("experts", "delta", "layer", activation) for activation in ("sigmoid", "softmax-null")],
    )
    def test_equal_a_mixture_built_without_the_expert(self, reads, mixing, granularity, activation):
        model = InPlace(1)
        x, text = inputs(model)
        experts = [lora(model, seed, 1 + seed) for seed in range(3)]
        # some scopes are changed by expert 1 only
        for i in (0, 2):
            modules = experts[i].modules.items()
            experts[i] = Adapter({name: part for name, part in modules if "double_blocks.0.txt" not in name})
        mixture = trained(model, experts, settings(reads, granularity, activation), mixing)
        gates = {}
        built = Bank(model, Mixture((experts[0], experts[2]), GateSet(2, mixture.gates.settings), mixing=mixing))
        for name in {scope.name for scope in built.scopes.values()}:
            whole = mixture.gates[name]
            rows = [0, 2, *range(3, whole.weight.shape[0])]
            columns = torch.ones(whole.features, dtype=torch.bool) if whole.owner is None else whole.owner != 1
            owner = None if whole.owner is None else (whole.owner[columns] > 1).long()
            mean, spread = whole.mean[columns], whole.spread[columns]
            size, layer = int(columns.sum()), whole.layer
            gates[name] = gate = Gate(size, 2, whole.settings, mean=mean, spread=spread, owner=owner, layer=layer)
            gate.weight.copy_(whole.weight[rows][:, columns])
            gate.bias.copy_(whole.bias[rows])
            gate.log_temperature.copy_(whole.log_temperature)
        detector = mixture.gates.detector
        if detector is not None:
            rows = [0, 2]
            detector = ConceptDetector(detector.weight[rows], detector.bias[rows], [detector.words[i] for i in rows])
        left = GateSet(2, mixture.gates.settings, gates, detector)
        without = Mixture((experts[0], experts[2]), left, mixing=mixing)
        with attach(model, without):
            expected = call(model, x, text)
        with attach(model, mixture.without(1)):
            assert close(call(model, x, text), expected, 1e-6)
        with attach(model, mixture):
            assert not close(call(model, x, text), expected, 1e-4)

    @pytest.mark.parametrize("reads", ["hidden", "experts"])
    def test_gates_read_where_they_did_in_training(self, reads):
        """Also if only the switched-off expert changed that layer: the gate reads its input, or nothing."""
        model = Transformer(1)
        x, text = inputs(model)
        a, b = lora(model, 1, names=["blocks.0.ff.0"]), lora(model, 2, names=["blocks.0.ff.2"])
        mixture = trained(model, (a, b), settings(reads))
        gate = mixture.gates["blocks.0.ff"]
        assert gate.layer == ("blocks.0.ff.0" if reads == "hidden" else "")
        caught: list[Tensor] = []
        model.blocks[0].ff[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        observed = Values()
        with attach(model, mixture.without(0)) as at, at.watch(observed):
            found = model(x, text)
        assert untouched(model)
        shut = (1.5 * torch.sigmoid(gate.bias[1:])).expand(2, 1)
        g = gate(rms_normalised(caught[0]).mean(1))[:, 1:] if reads == "hidden" else shut
        assert torch.allclose(observed.values["blocks.0.ff"], g, atol=1e-6)
        for row in range(2):
            one = slice(row, row + 1)
            assert close(found[one], merged(model, (b,), (float(g[row]),))(x[one], text[one]))

    @pytest.mark.parametrize("mixing", ["delta", "output"])
    @pytest.mark.parametrize("reads", READS)
    def test_one_left_under_softmax_acts_as_that_lora(self, model, reads, mixing):
        experts = [lora(model, seed) for seed in range(3)]
        x, text = inputs(model)
        mixture = trained(model, experts, settings(reads, "block", "softmax"), mixing)
        with attach(model, mixture.only([1])):
            assert close(call(model, x, text), call(merged(model, experts, (0, 1, 0)), x, text))

    @each_kind
    def test_another_order_is_the_same_mixture(self, reads, mixing, granularity):
        """Also if modules of the experts cover different rows of a layer."""
        model = InPlace(1)
        x, text = inputs(model)
        where = ["double_blocks.0.img.qkv"]
        plain = [n for n in lora(model, 0).modules if n not in where]
        g = torch.Generator().manual_seed(0)
        experts, targets = [], {}
        for seed, halves in enumerate((("v", "qkv"), ("q",), ("k", "v"))):
            modules = dict(lora(model, seed, 1 + seed, names=plain).modules)
            for i, path in enumerate(where):
                for half in halves:
                    start, stop = (0, 3 * D) if half == "qkv" else ("qkv".index(half) * D, "qkv".index(half) * D + D)
                    low = LowRank(torch.randn(2, D, generator=g), torch.randn(stop - start, 2, generator=g), 0.5)
                    modules[f"{i}.{half}"], targets[f"{i}.{half}"] = low, ParameterSlice(path, start, stop)
            experts.append(Adapter(modules))
        mixture = trained(model, experts, settings(reads, granularity, "softmax"), mixing, targets=targets)
        order = [2, 0, 1]
        turned = Mixture(tuple(experts[i] for i in order), mixture.gates.select(order), mixing=mixing, targets=targets)
        with attach(model, mixture):
            expected = call(model, x, text)
        with attach(model, turned):
            assert close(call(model, x, text), expected)
