"""Mixtures with gates held at some values equal merged weights, for all kinds of models and gates."""

from __future__ import annotations

import copy

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.layers.keymap import ParameterSlice
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet
from legomole.core.mole.mixture import Mixture

from ..merge.pools import close
from .kinds import KINDS, MODELS, each_kind, settings
from .mixtures import lora, merged, trained
from .models import D, InPlace, Transformer, UNet, call, inputs

pytestmark = pytest.mark.usefixtures("no_gradients")


class TestEqualsMerged:
    @pytest.mark.parametrize(
        ("kind", "reads", "mixing", "granularity"),
        [("in place", *kind) for kind in KINDS]
        + [(kind, "text", mixing, "block") for kind in ("transformer", "u-net") for mixing in ("delta", "output")]
        + [(kind, "experts", "delta", "layer") for kind in ("transformer", "u-net")],
    )
    def test_untrained_gates_and_gates_held_open(self, kind, reads, mixing, granularity):
        model = MODELS[kind]()
        a, b = lora(model, 1), lora(model, 2, 3)
        x, text = inputs(model)
        even = Mixture((a, b), GateSet(2, settings(reads, granularity)), (0.8, -0.5), 1.2, mixing)
        with attach(model, even) as at:
            if mixing == "delta":  # the sum of outputs is not the output of the sum
                assert close(call(model, x, text), call(merged(model, (a, b), (0.96, -0.6)), x, text))
            for i, (hot, strength) in enumerate((([1.0, 0.0], (0.96, 0)), ([0.0, 1.0], (0, -0.6)))):
                with at.hold(torch.eye(at.bank.experts)[i]):
                    assert close(call(model, x, text), call(merged(model, (a, b), strength), x, text)), hot
            with at.hold([0.0, 0.0]):
                base = call(model, x, text)
        assert close(base, call(model, x, text), 1e-6)

    def test_every_row_has_its_own_gates(self, model):
        """For example a prompt and a negative prompt in one batch."""
        a, b = lora(model, 1), lora(model, 2)
        x, text = inputs(model, 3)
        held = torch.tensor([[1.0, 0.0], [0.0, 0.0], [0.3, 1.4]])
        with attach(model, Mixture((a, b))) as at, at.hold(held):
            together = call(model, x, text)
        for row, gates in enumerate(held.tolist()):
            own = slice(row, row + 1)
            assert close(together[own], call(merged(model, (a, b), gates), x[own], text[own]))

    @each_kind
    def test_a_batch_equals_its_rows_alone(self, reads, mixing, granularity):
        model = UNet()
        x, text = inputs(model, 3)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings(reads, granularity), mixing)
        with attach(model, mixture):
            together = call(model, x, text)
            alone = torch.cat([call(model, x[i : i + 1], text[i : i + 1]) for i in range(3)])
            frames = call(model, x.repeat_interleave(2, 0), text.repeat_interleave(2, 0))
        assert close(together, alone, 1e-4)
        assert close(frames[::2], together, 1e-4)

    def test_rows_of_a_fused_layer(self):
        model = InPlace()
        x, text = inputs(model)
        g = torch.Generator().manual_seed(0)
        parts = {f"to_{n}": LowRank(torch.randn(2, D, generator=g), torch.randn(D, 2, generator=g), 1.0) for n in "qkv"}
        where = "double_blocks.0.img.qkv"
        targets = {f"to_{n}": ParameterSlice(where, D * i, D * (i + 1)) for i, n in enumerate("qkv")}
        split = Adapter({n: parts[n] for n in ("to_q", "to_v")})
        turned = Adapter({"mod": LowRank(torch.randn(1, D, generator=g), torch.randn(2 * D, 1, generator=g))})
        targets["mod"] = ParameterSlice("double_blocks.0.img.mod", 0, 2 * D, ((D, 2 * D), (0, D)))
        weights = copy.deepcopy(model)
        weights.get_submodule(where).weight[:D] += 0.5 * parts["to_q"].delta()
        weights.get_submodule(where).weight[2 * D :] += 0.5 * parts["to_v"].delta()
        delta = turned.modules["mod"].delta()
        weights.get_submodule("double_blocks.0.img.mod").weight += 2 * torch.cat([delta[D:], delta[:D]])
        with attach(model, Mixture((split, turned), targets=targets)) as at, at.hold([0.5, 2.0]):
            assert close(call(model, x, text), call(weights, x, text))

    @pytest.mark.parametrize("mixing", ["delta", "output"])
    def test_bfloat16(self, model, mixing):
        a, b = lora(model, 1), lora(model, 2)
        x, text = inputs(model)
        mixture = trained(model, (a, b), settings("experts", "block"), mixing)
        with attach(model, mixture):
            expected = call(model, x, text)
        model.bfloat16()
        with attach(model, mixture) as at:
            assert at.bank.stacks[next(iter(a.modules))].D.dtype == torch.bfloat16
            found = call(model, x.bfloat16(), text.bfloat16())
        assert found.dtype == torch.bfloat16
        assert close(found, expected, 0.03)

    def test_autocast(self):
        model = Transformer()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("experts"))
        with attach(model, mixture):
            expected = call(model, x, text)
            with torch.autocast("cpu", torch.bfloat16):
                found = call(model, x, text)
        assert close(found, expected, 0.03)
