"""attach(): mixtures equal merged weights, passes done by hand, finite differences; taken off, they leave no trace."""

from __future__ import annotations

import copy
import functools
import inspect
from typing import Any

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.layers.keymap import ParameterSlice
from legomole.core.lowrank import LowRank
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.bank import Bank
from legomole.core.mole.gates import Gate, GateSet, GateSettings, balance_loss
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.recompute import exact_gradients
from torch import Tensor, nn

from ..merge.pools import close
from .models import (
    FEATURES,
    D,
    InPlace,
    Transformer,
    UNet,
    Values,
    call,
    gradients,
    inputs,
    lora,
    merged,
    random_gates,
    rms_normalised,
    trained,
    untouched,
)

MODELS = {"transformer": lambda: Transformer(1), "u-net": UNet, "in place": lambda: InPlace(1)}
READS = ("text", "hidden", "experts", "flat")
GRANULARITIES = ("network", "block", "layer", "matrix")
KINDS = [(reads, "delta", granularity) for reads in READS for granularity in GRANULARITIES] + [
    (reads, "output", "block") for reads in READS
]
each_kind = pytest.mark.parametrize(("reads", "mixing", "granularity"), KINDS)


def settings(reads: str, granularity: str = "layer", activation: str = "sigmoid") -> GateSettings:
    return GateSettings(reads=reads, granularity=granularity, activation=activation)


@pytest.fixture(autouse=True)
def _no_gradients():
    """Tests that take gradients switch them on."""
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def model(request) -> nn.Module:
    return MODELS[request.param]()


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

    def test_every_row_has_gates_of_its_own(self, model):
        """As for the prompt and the negative prompt in one batch."""
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


class TestGatesByHand:
    def test_what_text_gates_read(self):
        model = Transformer()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("text"))
        seen = Values()
        with attach(model, mixture) as at, at.watch(seen):
            model(x, text)
        assert set(seen.values) == {"", "blocks.0.attn", "blocks.0.ff", "blocks.1.attn", "blocks.1.ff"}
        for name, value in seen.values.items():
            assert torch.allclose(value, mixture.gates[name](text.mean(1)), atol=1e-6)

    def test_what_gates_of_a_block_read(self):
        """Its input: the stream of the picture, mean over positions; channels first for images."""
        for model, block, stream in (
            (Transformer(), "blocks.0", lambda x: rms_normalised(x).mean(1)),
            (InPlace(), "double_blocks.0", lambda x: rms_normalised(x).mean(1)),
            (UNet(), "down_blocks.0.attentions.0", lambda x: rms_normalised(x, 1).mean((2, 3))),
        ):
            x, text = inputs(model)
            inside = "attn.to_q" if isinstance(model, Transformer) else "img.qkv"
            inside = "proj_in" if isinstance(model, UNet) else inside
            mixture = trained(model, (lora(model, 1, names=[f"{block}.{inside}"]),), settings("hidden", "block"))
            caught: list[Tensor] = []

            def catch(_: nn.Module, args: tuple, kwargs: dict, caught=caught) -> None:
                caught.append((args[0] if args else kwargs["img"]).clone())

            handle = model.get_submodule(block).register_forward_pre_hook(catch, with_kwargs=True)
            seen = Values()
            with attach(model, mixture) as at, at.watch(seen):
                call(model, x, text)
            handle.remove()
            assert torch.allclose(seen.values[block], mixture.gates[block](stream(caught[0])), atol=1e-6)

    def test_what_gates_of_experts_read(self):
        """The experts' outputs at the scope's first layer, as published; its gradient-free literal form."""
        model = Transformer()
        x, text = inputs(model)
        a, b = lora(model, 1, names=["inp"]), lora(model, 2, names=["inp"])
        read: dict[str, Tensor] = {}
        with (
            attach(model, Mixture((a, b), GateSet(2, settings("experts")))) as at,
            at.watch_inputs(lambda scope, f, owner: read.update({scope: f, f"{scope} owner": owner})),
        ):
            model(x, text)
        z = torch.cat([x @ (part.scale**0.5 * part.A).mT for part in (a.modules["inp"], b.modules["inp"])], -1)
        E = torch.cat([x @ adapter.modules["inp"].delta().mT for adapter in (a, b)], -1)
        rho = E.square().mean(-1, keepdim=True).sqrt()
        assert torch.allclose(read[""], (z / rho).mean(1), atol=1e-5)
        assert read[" owner"].tolist() == [0, 0, 1, 1]

    def test_flat_gates_read_every_position_apart(self):
        model = Transformer()
        x, text = inputs(model)
        mixtures = [Mixture((lora(model, 1), lora(model, 2)), GateSet(2, settings(r))) for r in ("experts", "flat")]
        read: list[Tensor] = []
        for mixture in mixtures:
            with (
                attach(model, mixture) as at,
                at.watch_inputs(lambda scope, f, _: read.append(f) if not scope else None),
            ):
                model(x, text)
        assert torch.allclose(read[1].unflatten(1, (5, -1)).mean(1), read[0], atol=1e-6)

    @pytest.mark.parametrize("reads", READS)
    def test_output_mixing_equals_passes_done_by_hand(self, reads):
        """``F(x) + sum_i g_i (F_i(x) - F(x))`` with `F_i` the block with LoRA `i` in its weights."""
        model = Transformer()
        experts = lora(model, 1), lora(model, 2, 3)
        x, text = inputs(model)
        mixture = trained(model, experts, settings(reads, "block", "softmax"), "output")
        with attach(model, mixture):
            found = model(x, text)
        single = [merged(model, experts, gates) for gates in ((1, 0), (0, 1))]

        def layer(name: str, x: Tensor, g: Tensor) -> Tensor:
            deltas = [x @ adapter.modules[name].delta().mT for adapter in experts]
            g = g[..., None] if x.ndim == 2 else g[..., None, None]
            return model.get_submodule(name)(x) + g[:, 0] * deltas[0] + g[:, 1] * deltas[1]

        gates = mixture.gates
        if reads == "text":
            outside = gates[""](text.mean(1))
        elif reads == "hidden":
            outside = gates[""](rms_normalised(x).mean(1))
        else:
            z = torch.cat([x @ (p.modules["inp"].scale ** 0.5 * p.modules["inp"].A).mT for p in experts], -1)
            E = torch.cat([x @ p.modules["inp"].delta().mT for p in experts], -1)
            f = z / E.square().mean(-1, keepdim=True).sqrt()
            outside = gates[""](f.mean(1) if reads == "experts" else f.flatten(1))
        h = layer("inp", x, outside) + layer("ctx", text.mean(1), outside)[:, None]
        for i in range(2):
            F, Fs = model.blocks[i](h), [m.blocks[i](h) for m in single]
            E = torch.cat([F_i - F for F_i in Fs], -1)
            E = E / E.square().mean(-1, keepdim=True).sqrt()
            features = {"text": text, "hidden": rms_normalised(h), "experts": E}
            read = E.flatten(1) if reads == "flat" else features[reads].mean(1)
            g = gates[f"blocks.{i}"](read)
            h = F + sum(g[:, j, None, None] * (F_i - F) for j, F_i in enumerate(Fs))
        assert close(found, layer("final", h, outside))

    def test_output_mixing_of_blocks_within_blocks(self):
        """Innermost blocks run once per LoRA and once without; the layers around them are mixed by their updates."""
        model = UNet()
        passes: dict[str, int] = {}
        for name in ("down_blocks.0", "down_blocks.0.attentions.0", "down_blocks.0.resnets.0"):
            model.get_submodule(name).register_forward_pre_hook(
                lambda *_, name=name: passes.update({name: passes.get(name, 0) + 1})
            )
        inner = model.down_blocks[0].attentions[0].transformer_blocks[0].attn.to_q
        inner.register_forward_pre_hook(lambda *_: passes.update(inner=passes.get("inner", 0) + 1))
        a, b = lora(model, 1), lora(model, 2)
        mixture = Mixture((a, b), GateSet(2, settings("text", "block")), mixing="output")
        x, text = inputs(model)
        names = [n for n in a.modules if "resnets" in n or "transformer_blocks" in n]
        with attach(model, mixture):
            found = call(model, x, text)
        assert passes == {
            "down_blocks.0": 1,
            "down_blocks.0.attentions.0": 1,
            "down_blocks.0.resnets.0": 1,  # what is under a hook of another program sees one call
            "inner": 3,
        }
        # by hand: blocks in a model whose other layers are merged
        rest = [Adapter({n: p for n, p in e.modules.items() if n not in names}) for e in (a, b)]
        own = [Adapter({n: p for n, p in e.modules.items() if n in names}) for e in (a, b)]
        by_hand = merged(model, rest, (1, 1))
        singles = [merged(by_hand, own, gates) for gates in ((1, 0), (0, 1))]
        for path in ("down_blocks.0.resnets.0", "down_blocks.0.attentions.0.transformer_blocks.0"):
            block, alone = by_hand.get_submodule(path), [m.get_submodule(path) for m in singles]
            plain = type(block).forward
            block.forward = lambda y, block=block, plain=plain, alone=alone: sum(
                (m(y) for m in alone), -plain(block, y)
            )
        assert close(found, call(by_hand, x, text))

    def test_two_mixtures_add_up(self):
        """Both read a text that is given by position."""
        model = Transformer()
        x, text = inputs(model)
        experts = [lora(model, seed) for seed in range(4)]
        first, second = (trained(model, experts[i : i + 2], settings("text", "network")) for i in (0, 2))
        with attach(model, first), attach(model, second):
            found = model(x, text)
        assert untouched(model)
        for row in range(2):
            f = text[row : row + 1].mean(1)
            gates = [*first.gates[""](f)[0].tolist(), *second.gates[""](f)[0].tolist()]
            assert close(found[row : row + 1], merged(model, experts, gates)(x[row : row + 1], text[row : row + 1]))


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
        # expert 1 alone changes some scopes
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
        without = Mixture((experts[0], experts[2]), GateSet(2, mixture.gates.settings, gates), mixing=mixing)
        with attach(model, without):
            expected = call(model, x, text)
        with attach(model, mixture.without(1)):
            assert close(call(model, x, text), expected, 1e-6)
        with attach(model, mixture):
            assert not close(call(model, x, text), expected, 1e-4)

    @pytest.mark.parametrize("reads", ["hidden", "experts"])
    def test_gates_read_where_they_did_in_training(self, reads):
        """Also where only the expert that is off changed that layer: its input, or nothing of the other expert."""
        model = Transformer(1)
        x, text = inputs(model)
        a, b = lora(model, 1, names=["blocks.0.ff.0"]), lora(model, 2, names=["blocks.0.ff.2"])
        mixture = trained(model, (a, b), settings(reads))
        gate = mixture.gates["blocks.0.ff"]
        assert gate.layer == ("blocks.0.ff.0" if reads == "hidden" else "")
        caught: list[Tensor] = []
        model.blocks[0].ff[0].register_forward_pre_hook(lambda _, args: caught.append(args[0]))
        seen = Values()
        with attach(model, mixture.without(0)) as at, at.watch(seen):
            found = model(x, text)
        assert untouched(model)
        shut = (1.5 * torch.sigmoid(gate.bias[1:])).expand(2, 1)
        g = gate(rms_normalised(caught[0]).mean(1))[:, 1:] if reads == "hidden" else shut
        assert torch.allclose(seen.values["blocks.0.ff"], g, atol=1e-6)
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
        """Also where modules of the experts cover different rows of a layer."""
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


class TestVideoBlocks:
    """Transformers that keep frames, rows and columns apart have channels last; U-Nets have them first."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.out = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.out(torch.tanh(self.to_q(x)))

    class Model(nn.Module):
        def __init__(self, block: type[nn.Module]) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([block()])

        def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
            return self.blocks[0](x)

    @pytest.mark.parametrize("mixing", ["delta", "output"])
    def test_channels_last(self, mixing):
        model = self.Model(self.Block)
        x = torch.randn(2, 3, 4, 5, 6)
        mixture = Mixture((lora(model, 1), lora(model, 2)), GateSet(2, settings("hidden", "block")), mixing=mixing)
        seen = {}
        with attach(model, mixture) as attachment, attachment.watch_inputs(lambda scope, f, _: seen.update({scope: f})):
            model(x)
        assert close(seen["blocks.0"], rms_normalised(x).mean((1, 2, 3)))


class TestDetach:
    def test_leaves_the_model_as_it_was(self, model):
        x, text = inputs(model)
        before, weights = call(model, x, text), {n: p.clone() for n, p in model.state_dict().items()}
        attachment = attach(
            model, trained(model, (lora(model, 1), lora(model, 2)), settings("hidden", "block"), "output")
        )
        assert not close(call(model, x, text), before, 0.01)
        assert list(model.state_dict()) == list(weights)
        attachment.detach()
        attachment.detach()
        assert untouched(model)
        assert torch.equal(call(model, x, text), before)
        assert all(torch.equal(p, weights[n]) for n, p in model.state_dict().items())

    def test_after_exceptions_inside_and_while_attaching(self):
        model = Transformer()
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("hidden", "block"))
        with pytest.raises(RuntimeError), attach(model, mixture) as at, at.hold([1, 0]), at.watch(Values()):
            model(torch.zeros(1, 5, 3), None)
        assert untouched(model)
        with pytest.raises(AttributeError):
            attach(Transformer(1), Bank(model, mixture))
        other = Transformer(1)
        with pytest.raises(AttributeError):
            Attachment(other, Bank(model, mixture))
        assert untouched(other)

    @pytest.mark.parametrize("first_off", [0, 1])
    def test_two_mixtures_in_either_order(self, first_off):
        model = Transformer()
        x, text = inputs(model)
        base = model(x, text)
        mixtures = [trained(model, (lora(model, i), lora(model, 5 + i)), settings("hidden")) for i in range(2)]
        alone = []
        for mixture in mixtures:
            with attach(model, mixture):
                alone.append(model(x, text))
        attached = [attach(model, mixture) for mixture in mixtures]
        attached[first_off].detach()
        assert torch.equal(model(x, text), alone[1 - first_off])
        attached[1 - first_off].detach()
        assert untouched(model)
        assert torch.equal(model(x, text), base)

    def test_three_mixtures_taken_off_from_below(self):
        model = Transformer()
        x, text = inputs(model)
        base = model(x, text)
        attached = [attach(model, Mixture((lora(model, i),))) for i in range(3)]
        for attachment in attached:
            attachment.detach()
        assert untouched(model)
        assert torch.equal(model(x, text), base)

    def test_what_stays_below_another_program_does_not_pile_up(self):
        """A program on top that puts back what it found, again and again, with a new mixture below it each time."""
        model = Transformer()
        x, text = inputs(model)
        base, layer = model(x, text), model.blocks[0].attn.to_q
        for i in range(4):
            attachment = attach(model, Mixture((lora(model, i),)))
            found = layer.forward
            layer.forward = functools.wraps(found)(lambda *args, found=found: found(*args))
            attachment.detach()
            layer.forward = found
        assert torch.equal(model(x, text), base)
        assert found.previous is None
        attach(model, Mixture((lora(model, 9),))).detach()
        assert untouched(model)

    @pytest.mark.parametrize("ours_first", [True, False])
    def test_under_the_wrapper_of_another_program(self, ours_first):
        """It keeps the method that it found and puts it back; we may be gone by then."""
        model = Transformer()
        x, text = inputs(model)
        base = model(x, text)
        layer = model.blocks[0].attn.to_q
        attachment = attach(model, Mixture((lora(model, 1),)))
        mixed, found = model(x, text), layer.forward
        layer.forward = functools.wraps(found)(lambda *args, **kwargs: found(*args, **kwargs))
        assert torch.equal(model(x, text), mixed)
        if ours_first:
            attachment.detach()
            assert torch.equal(model(x, text), base)
        layer.forward = found
        assert torch.equal(model(x, text), base if ours_first else mixed)
        attachment.detach()
        assert torch.equal(model(x, text), base)

    def test_over_the_wrapper_of_another_program(self):
        model = Transformer()
        x, text = inputs(model)
        layer = model.blocks[0].attn.to_q
        plain = layer.forward
        layer.forward = lambda *args, **kwargs: 2 * plain(*args, **kwargs)
        wrapper, before = layer.forward, model(x, text)
        with attach(model, Mixture((lora(model, 1),))):
            assert not torch.equal(model(x, text), before)
        assert layer.forward is wrapper
        assert torch.equal(model(x, text), before)

    @pytest.mark.parametrize("hooks_first", [True, False])
    @pytest.mark.parametrize("detach_first", [True, False])
    def test_with_offloading_hooks(self, hooks_first, detach_first):
        pytest.importorskip("accelerate")
        from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module

        model = Transformer()
        x, text = inputs(model)
        base, mixture = model(x, text), trained(model, (lora(model, 1), lora(model, 2)), settings("experts"))
        with attach(model, mixture):
            mixed = model(x, text)

        def hook() -> None:
            for module in model.modules():
                if not list(module.children()):
                    add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", offload=True))

        if hooks_first:
            hook()
        attachment = attach(model, mixture)
        if not hooks_first:
            hook()
        assert torch.equal(model(x, text), mixed)
        if detach_first:
            attachment.detach()
            assert torch.equal(model(x, text), base)
            remove_hook_from_module(model, recurse=True)
        else:
            remove_hook_from_module(model, recurse=True)
            assert torch.equal(model(x, text), mixed)
            attachment.detach()
        assert torch.equal(model(x, text), base)


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

    def test_nothing_is_left_of_a_pass(self):
        """Gates of one prompt must not be used for the next, nor keep its graph alive."""
        model = Transformer()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("text"))
        with attach(model, mixture) as at:
            first = model(x, text)
            model(x, -text)
            assert torch.equal(model(x, text), first)
            assert {site.value for site in at._gate_values.scopes.values()} == {None}

    def test_factors_follow_the_model_to_its_device(self):
        model = Transformer()
        mixture = Mixture((lora(model, 1), lora(model, 2)))
        with attach(model, mixture):
            model.to("meta")
            assert model(*(t.to("meta") for t in inputs(model))).device.type == "meta"
        with attach(model, mixture) as at:
            assert at.bank.stacks["inp"].D.device.type == "cpu"  # a model that is offloaded says nothing

    def test_layers_called_by_keyword(self):
        model = Transformer()
        x, text = inputs(model)
        model.blocks[0].ff.forward = lambda h, ff=model.blocks[0].ff: ff[2](input=ff[1](ff[0](input=h)))
        with attach(model, Mixture((lora(model, 1),))):
            found = model(x, text)
        assert close(found, merged(Transformer(), (lora(model, 1),), (1,))(x, text))

    def test_left_out_is_told(self):
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


class TestErrors:
    def test_text_gates_on_a_model_without_text(self):
        model = Transformer()
        x, _ = inputs(model)
        with attach(model, trained(model, (lora(model, 1), lora(model, 2)), settings("text"))):
            with pytest.raises(MergeError, match=r"got none[\s\S]*encoder_hidden_states or context[\s\S]*read hidden"):
                model(x)
            with pytest.raises(MergeError, match="got none"):  # a part of the model alone
                model.blocks[0](model.inp.forward.inner(x))
        with attach(model, Mixture((lora(model, 1),))):
            model(x)  # untrained, they read nothing

    def test_gates_for_features_of_another_size(self):
        model = Transformer()
        x, _ = inputs(model)
        gates = GateSet(1, settings("text"), {"blocks.0.ff": Gate(FEATURES + 1, 1, settings("text"))})
        with (
            attach(model, Mixture((lora(model, 1),), gates)),
            pytest.raises(
                MergeError, match=r"another size[\s\S]*blocks\.0\.ff[\s\S]*7 features[\s\S]*found: +6[\s\S]*base model"
            ),
        ):
            model(*inputs(model))
        gates = GateSet(1, settings("hidden"), {"blocks.0.ff": Gate(D + 1, 1, settings("hidden"))})
        with attach(model, Mixture((lora(model, 1),), gates)), pytest.raises(MergeError, match="another size"):
            model(x)

    def test_flat_gates_at_another_size_of_picture(self):
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

    def test_one_gate_for_all_that_reads_within_checkpoints(self):
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


class TestGradients:
    """Of a loss through the whole model, with respect to the gates. float64, so that differences are exact."""

    @staticmethod
    def prepared(kind: str, reads: str, mixing: str = "delta", granularity: str = "block", checkpointing=False):
        model = MODELS[kind]().double()
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings(reads, granularity, "softmax-null"), mixing)
        attachment = attach(model, mixture, checkpointing=checkpointing)
        attachment.bank.gates.double()
        x, text = inputs(model, dtype=torch.float64)
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

        def loss() -> Tensor:
            seen = Values()
            with attachment.watch(seen), exact_gradients():
                error = (call(model, x, text) - target).square().mean()
            return error + 0.3 * balance_loss(list(seen.values.values()))

        return attachment, loss

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize(
        ("kind", "reads", "mixing"),
        [(kind, reads, "delta") for kind in MODELS for reads in READS[:3]]
        + [("transformer", "flat", "delta"), ("in place", "hidden", "output"), ("in place", "experts", "output")],
    )
    def test_equal_finite_differences(self, kind, reads, mixing, checkpointing):
        """Along a random direction in all parameters at once, and along some parameters alone."""
        attachment, loss = self.prepared(kind, reads, mixing, checkpointing=checkpointing)
        with torch.enable_grad():
            found = gradients(attachment, loss)
        parameters = dict(attachment.bank.gates.named_parameters())
        assert found.keys() == parameters.keys()
        g = torch.Generator().manual_seed(0)
        everywhere = {n: torch.randn(p.shape, generator=g, dtype=torch.float64) for n, p in parameters.items()}
        directions = [everywhere]
        for name, p in list(parameters.items())[:4]:
            one = torch.zeros(p.numel(), dtype=torch.float64)
            one[int(torch.randint(p.numel(), (), generator=g))] = 1.0
            directions.append({name: one.view(p.shape)})
        for direction in directions:
            h = 1e-5
            sides: list[float] = []
            for sign in (1, -1):
                for name, d in direction.items():
                    parameters[name].add_(sign * h * d)
                sides.append(float(loss()))
                for name, d in direction.items():
                    parameters[name].sub_(sign * h * d)
            difference = (sides[0] - sides[1]) / (2 * h)
            analytic = sum(float((found[name] * d).sum()) for name, d in direction.items())
            assert analytic == pytest.approx(difference, rel=1e-5, abs=1e-9), direction.keys()

    @pytest.mark.parametrize(
        ("kind", "reads", "granularity"),
        [(kind, reads, "layer") for kind in MODELS for reads in READS[:3]]
        + [("u-net", "hidden", "matrix"), ("in place", "text", "network")],
    )
    def test_checkpointing_changes_nothing(self, kind, reads, granularity):
        found = []
        for checkpointing in (False, True):
            attachment, loss = self.prepared(kind, reads, "delta", granularity, checkpointing)
            with torch.enable_grad():
                found.append(gradients(attachment, loss))
        assert found[0].keys() == found[1].keys()
        for name, gradient in found[0].items():
            assert torch.allclose(gradient, found[1][name], rtol=1e-9, atol=1e-12), name
            assert float(gradient.abs().max()) > 0

    def test_checkpointing_recomputes_in_the_backward_pass(self):
        passes = []
        attachment, loss = self.prepared("in place", "hidden", checkpointing=True)
        attachment.model.double_blocks[0].img.qkv.register_forward_hook(
            lambda *_: passes.append(torch.is_grad_enabled())
        )
        with torch.enable_grad():
            gradients(attachment, loss)
        assert passes == [False, True]

    def test_checkpoints_outlive_no_mixture(self):
        attachment, loss = self.prepared("in place", "hidden", checkpointing=True)
        with torch.enable_grad():
            total = loss()
        attachment.detach()
        with pytest.raises(MergeError, match=r"detached before the backward pass[\s\S]*double_blocks\.0"):
            total.backward()

    def test_dropout_falls_alike_in_the_recomputation(self):
        model = Transformer().double()
        model.blocks[0].attn.to_out[1] = nn.Dropout(0.5)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("hidden"))
        x, text = inputs(model, dtype=torch.float64)
        found = []
        for checkpointing in (False, True):
            with attach(model.train(), mixture, checkpointing=checkpointing) as at, torch.enable_grad():
                torch.manual_seed(0)
                found.append(gradients(at, lambda: model(x, text).square().mean()))
        assert all(torch.allclose(g, found[1][n], rtol=1e-5, atol=1e-8) for n, g in found[0].items())

    def test_writing_in_place_does_not_spoil_what_was_kept(self):
        """Plain autograd refuses; both activations with and without a gradient must be kept as they were."""
        a, t = torch.ones(3, requires_grad=True), torch.arange(3.0)
        with torch.enable_grad():
            with exact_gradients():
                y = (0.3 * a).tanh()
                y *= 2
                w = a * t
                t += 1
                total = (y * y).sum() + (w * t).sum()
            total.backward()
        # d/da [4 tanh(.3 a)^2] = 2.4 tanh (1 - tanh^2); d/da [a t (t + 1)] = t (t + 1), t = 0, 1, 2
        tanh = torch.tanh(torch.tensor(0.3))
        assert torch.allclose(a.grad, 2.4 * tanh * (1 - tanh**2) + torch.tensor([0.0, 2.0, 6.0]))

    def test_weights_are_kept_without_copies(self):
        weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        kept: list[int] = []
        with torch.enable_grad(), exact_gradients():
            y = torch.ones(1, 3, requires_grad=True) @ weight.mT
            kept.append(y.grad_fn._saved_mat2.data_ptr())
        assert kept == [weight.data_ptr()]

    def test_only_gates_learn(self):
        model = UNet().requires_grad_(True)
        mixture = trained(model.requires_grad_(False), (lora(model, 1), lora(model, 2)), settings("experts"))
        with attach(model, mixture) as at, torch.enable_grad():
            gradients(at, lambda: call(model, *inputs(model)).square().mean())
            assert all(p.grad is None for p in model.parameters())
            assert all(not b.requires_grad for stack in at.bank.stacks.values() for b in stack.buffers())
