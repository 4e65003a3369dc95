"""Gates per token: every position against a loop by hand."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import Gate, GateSet, GateSettings, balance_loss
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.recompute import exact_gradients
from legomole.core.mole.stack import ExpertSlice, Stack, fit_batch
from legomole.core.mole.trained import Expert, TrainedGates
from legomole.core.train.features import standardise_features
from torch import Tensor, nn

from ..merge.pools import close
from .mixtures import Values, gradients, lora, merged, rms_normalised
from .models import D, InPlace, Transformer, UNet, call, inputs
from .test_texts import names, trained_without_text

GRANULARITIES = ("network", "block", "layer", "matrix")


def settings(granularity: str = "layer", activation: str = "sigmoid") -> GateSettings:
    return GateSettings(reads="token", granularity=granularity, activation=activation)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


class TestStack:
    g = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    updates = tuple(
        LowRank(torch.randn(r, 4, generator=torch.Generator().manual_seed(r)), torch.ones(5, r)) for r in (1, 3)
    )

    def stack(self) -> Stack:
        return Stack([ExpertSlice(i, update, 0, 5) for i, update in enumerate(self.updates)], 5)

    def test_every_position_has_its_own(self):
        layer, x, stack = nn.Linear(4, 5), torch.randn(2, 3, 4), self.stack()
        y = stack.add(layer(x), stack.gated(stack.down(layer, x), self.g))
        for b in range(2):
            for t in range(3):
                deltas = [update.delta() @ x[b, t] for update in self.updates]
                assert close(y[b, t], layer(x[b, t]) + self.g[b, t, 0] * deltas[0] + self.g[b, t, 1] * deltas[1])
        assert fit_batch(self.g, 4) is self.g

    def test_a_layer_that_sees_the_tokens_in_a_row(self):
        stack, z = self.stack(), torch.randn(6, 4)
        assert torch.equal(stack.gated(z, self.g), stack.gated(z.unflatten(0, (2, 3)), self.g).flatten(0, 1))

    def test_other_positions_are_refused(self):
        with pytest.raises(MergeError, match=r"other positions[\s\S]*\(2, 3\) positions[\s\S]*found: +\(2, 4\)"):
            self.stack().unit_gates(self.g, torch.randn(2, 4, 4))
        low = LowRank(torch.ones(1, 4), torch.ones(5, 1), 1.0, (1, 1))
        with pytest.raises(MergeError, match="an image"):
            Stack([ExpertSlice(0, low, 0, 5)], 5, (1, 1)).unit_gates(self.g[..., :1], torch.randn(2, 1, 3, 1))


class Loop:
    """The layers of a model computed position by position: the expected output of a mixture with gates per token.

    Args:
        scope_of: Layer -> scope.
        readers: Scope -> the module whose input its gate reads.
    """

    def __init__(self, model: nn.Module, mixture: Mixture, scope_of: dict[str, str], readers: dict[str, str]) -> None:
        self.model, self.mixture = copy.deepcopy(model), mixture
        self.values: dict[str, Tensor] = {}
        for path in {*readers.values()}:
            module = self.model.get_submodule(path)
            module.register_forward_pre_hook(
                lambda _, args, kwargs, p=path: self.read([s for s, r in readers.items() if r == p], args, kwargs),
                with_kwargs=True,
            )
        for name, scope in scope_of.items():
            layer = self.model.get_submodule(name)
            layer.register_forward_hook(lambda _, args, y, n=name, s=scope: self.add(n, s, args[0], y))

    def read(self, scopes: list[str], args: Any, kwargs: Any) -> None:
        x = args[0] if args else kwargs["hidden_states"]
        for scope in scopes:
            gate = self.mixture.gates[scope]
            rows = [[gate(rms_normalised(row[None]))[0] for row in one] for one in x]
            self.values[scope] = torch.stack([torch.stack(one) for one in rows])

    def add(self, name: str, scope: str, x: Tensor, y: Tensor) -> Tensor:
        y = y.clone()
        for i, expert in enumerate(self.mixture.experts):
            for b in range(x.shape[0]):
                for t in range(x.shape[1]):
                    if name in expert.modules:
                        y[b, t] += self.values[scope][b, t, i] * (expert.modules[name].delta() @ x[b, t])
        return y


class TestMixing:
    @pytest.mark.parametrize("activation", ["sigmoid", "softmax", "softmax-null"])
    @pytest.mark.parametrize("granularity", GRANULARITIES)
    def test_equals_a_loop_by_hand(self, granularity, activation):
        model = Transformer(2)
        mixture = trained_without_text(model, settings(granularity, activation))
        x, _ = inputs(model)
        with attach(model, mixture) as at:
            found, scopes = model(x), at.bank.scopes
        scope_of = {path: scope.name for path, scope in scopes.items()}
        first = {scope: path for path, scope in reversed(scope_of.items())}
        readers = {scope: scope if granularity == "block" and scope else path for scope, path in first.items()}
        assert close(found, Loop(model, mixture, scope_of, readers).model(x))
        assert not close(found, model(x), 1e-2)

    def test_positions_do_not_see_each_other(self):
        """Without attention a token's output depends on that token only."""
        model = Transformer(1)
        model.blocks[0].attn = nn.Sequential(nn.Linear(D, D)).requires_grad_(False)
        mixture = trained_without_text(model, settings())
        x, _ = inputs(model)
        with attach(model, mixture):
            whole = model(x)
            assert close(whole[:, 2:4], model(x[:, 2:4]))

    def test_output_mixing_by_hand(self):
        model = Transformer(1)
        own = [name for name in names(model) if name.startswith("blocks")]
        experts = lora(model, 1, names=own), lora(model, 2, 3, names=own)
        untrained = Mixture(experts, GateSet(2, settings("block")), mixing="output")
        gate = Gate(D, 2, settings("block"))
        gate.weight.copy_(torch.randn(2, D, generator=torch.Generator().manual_seed(5)))
        mixture = Mixture(experts, GateSet(2, settings("block"), {"blocks.0": gate}), mixing="output")
        x, _ = inputs(model)
        with attach(model, mixture):
            found = model(x)
        h = model.inp(x)
        outputs = [merged(model, experts, on).blocks[0](h) for on in ((0, 0), (1, 0), (0, 1))]
        g = gate(rms_normalised(h))
        assert g.shape == (2, 5, 2)
        y = outputs[0] + sum(g[..., i, None] * (outputs[1 + i] - outputs[0]) for i in range(2))
        assert close(found, model.final(y))
        with attach(model, untrained):
            assert not close(found, model(x), 1e-2)

    def test_held_for_each_position(self):
        model = Transformer(1)
        mixture = Mixture((lora(model, 1, names=names(model)),))
        x, _ = inputs(model)
        held = torch.rand(2, 5, 1, generator=torch.Generator().manual_seed(0))
        with attach(model, mixture) as at, at.hold(held):
            found = model(x)
        with attach(model, mixture) as at, at.hold(held[:, :1].expand(-1, 5, -1)):
            other = model(x)
        with attach(model, mixture) as at, at.hold(held[:, 0]):
            assert close(other, model(x))
        assert not close(found, other, 1e-2)

    def test_switched_off_experts(self):
        model = Transformer(1)
        mixture = trained_without_text(model, settings())
        x, _ = inputs(model)
        closed = mixture.gates.copy()
        for scope in closed.names:
            closed[scope].weight[1], closed[scope].bias[1] = 0.0, -1e4
        with attach(model, Mixture(mixture.experts, closed)):
            expected = model(x)
        with attach(model, mixture.without(1)):
            assert close(model(x), expected)

    def test_where_the_gate_read_is_no_longer_mixed(self):
        """Only the switched-off LoRA changed the layer that the gate reads; the gate still reads it."""
        model = Transformer(1)
        a, b = lora(model, 1, names=["blocks.0.ff.0", "blocks.0.ff.2"]), lora(model, 2, names=["blocks.0.ff.2"])
        untrained = Mixture((a, b), GateSet(2, settings()))
        gate = Gate(D, 2, settings(), layer="blocks.0.ff.0")
        gate.weight.copy_(torch.randn(2, D, generator=torch.Generator().manual_seed(5)))
        mixture = Mixture(untrained.experts, GateSet(2, settings(), {"blocks.0.ff": gate}))
        x, _ = inputs(model)
        with attach(model, mixture.only([1])):
            found = model(x)
        loop = Loop(model, mixture.only([1]), {"blocks.0.ff.2": "blocks.0.ff"}, {"blocks.0.ff": "blocks.0.ff.0"})
        assert close(found, loop.model(x))

    def test_files(self, tmp_path: Path):
        model = Transformer(1)
        mixture = trained_without_text(model, settings())
        TrainedGates(mixture.gates, tuple(map(Expert.of, mixture.experts))).save(tmp_path / "gates.safetensors")
        gates = TrainedGates.load(tmp_path / "gates.safetensors").of(mixture.experts[::-1])
        assert gates.settings.reads == "token"
        x, _ = inputs(model)
        with attach(model, mixture):
            expected = model(x)
        with attach(model, Mixture(mixture.experts[::-1], gates)):
            assert close(model(x), expected)


class TestRefused:
    def test_images(self):
        model = UNet()
        mixture = Mixture((lora(model, 1),), GateSet(1, settings()))
        with attach(model, mixture) as at, pytest.raises(MergeError, match=r"read sequences[\s\S]*read hidden"):
            standardise_features(at, lambda: call(model, *inputs(model)))

    def test_streams_of_other_lengths(self):
        model = InPlace()
        gate = Gate(D, 1, settings("block"))
        mixture = Mixture((lora(model, 1),), GateSet(1, settings("block"), {"double_blocks.0": gate}))
        with attach(model, mixture), pytest.raises(MergeError, match=r"other positions[\s\S]*granularity matrix"):
            call(model, *inputs(model))


class TestWatchingAndTraining:
    def test_observers_get_the_mean_over_own_positions(self):
        model = Transformer(1)
        mixture = trained_without_text(model, settings("matrix"))
        x, _ = inputs(model)
        own = torch.tensor([[True, True, False, False, False], [False, True, True, True, True]])

        class Padding:
            def begin_pass(self, args, kwargs):
                from legomole.core.mole.texts import TextPositions

                return TextPositions(own)

            def end_pass(self, output, values):
                self.shapes = {tuple(value.shape) for value in values.values()}

        padding, observed = Padding(), Values()
        with attach(model, mixture, texts=padding) as at, at.watch(observed):
            model(x)
        g = mixture.gates["inp"](rms_normalised(x))
        assert close(observed.values["inp"], torch.stack([g[0, :2].mean(0), g[1, 1:].mean(0)]))
        assert padding.shapes == {(2, 5, 2)}
        with attach(model, mixture) as at, at.watch(observed):
            model(x)
        assert close(observed.values["inp"], g.mean(1))

    def test_features_are_measured_over_tokens(self):
        model = Transformer(1)
        mixture = Mixture((lora(model, 1, names=["inp"]),), GateSet(1, settings("matrix")))
        x, _ = inputs(model)
        with attach(model, mixture) as at:
            gates = standardise_features(at, lambda: model(x))
        f = rms_normalised(x).flatten(0, 1)
        assert close(gates["inp"].mean, f.mean(0))
        assert close(gates["inp"].spread, (1.01 * f.var(0, unbiased=False)).sqrt(), 0.1)
        assert gates["inp"].layer == "inp"

    @pytest.mark.parametrize(
        ("granularity", "mixing", "checkpointing"),
        [("network", "delta", False)]
        + [(g, "delta", c) for g in GRANULARITIES[1:] for c in (False, True)]
        + [("block", "output", c) for c in (False, True)],
    )
    def test_gradients_equal_finite_differences(self, granularity, mixing, checkpointing):
        model = Transformer(1).double()
        mixture = trained_without_text(model, settings(granularity, "softmax-null"), mixing)
        x = inputs(model, dtype=torch.float64)[0]
        with attach(model, mixture, checkpointing=checkpointing) as at:
            at.bank.gates.double()

            def loss() -> Tensor:
                observed = Values()
                with at.watch(observed), exact_gradients():
                    error = model(x).square().mean()
                return error + 0.3 * balance_loss(list(observed.values.values()))

            with torch.enable_grad():
                found = gradients(at, loss)
            g = torch.Generator().manual_seed(0)
            parameters = dict(at.bank.gates.named_parameters())
            assert found.keys() == parameters.keys()
            away = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in parameters.items()}
            sides = []
            for sign in (1, -1):
                for name, p in parameters.items():
                    p.add_(sign * 1e-5 * away[name])
                sides.append(float(loss()))
                for name, p in parameters.items():
                    p.sub_(sign * 1e-5 * away[name])
        analytic = sum(float((found[name] * away[name]).sum()) for name in found)
        assert analytic == pytest.approx((sides[0] - sides[1]) / 2e-5, rel=1e-5, abs=1e-9)
