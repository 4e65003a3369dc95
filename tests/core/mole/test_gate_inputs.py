"""What gates read, and mixing of outputs, against computations by hand."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet
from legomole.core.mole.mixture import Mixture
from torch import Tensor, nn

from ..merge.pools import close
from .kinds import READS, settings
from .mixtures import Values, lora, merged, random_detector, rms_normalised, trained, untouched
from .models import FEATURES, InPlace, Transformer, UNet, call, inputs

pytestmark = pytest.mark.usefixtures("no_gradients")


def presence(mixture: Mixture, text: Tensor) -> Tensor:
    """What text gates read, computed literally: each token's score, weighted by softmax(scores / 0.5)."""
    detector = mixture.gates.detector
    scores = rms_normalised(text) @ detector.weight.mT + detector.bias
    return torch.sigmoid((torch.softmax(scores / 0.5, 1) * scores).sum(1))


class Masked(Transformer):
    """Takes the mask of its text, and ignores it."""

    def forward(self, x: Tensor, context: Tensor, encoder_attention_mask: object = None) -> Tensor:
        return super().forward(x, context)


class TestGatesByHand:
    @pytest.mark.parametrize("reads", ["text", "text-mean"])
    def test_text_gates_read_the_text(self, reads):
        model = Transformer()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings(reads))
        observed = Values()
        with attach(model, mixture) as at, at.watch(observed):
            model(x, text)
        assert set(observed.values) == {"", "blocks.0.attn", "blocks.0.ff", "blocks.1.attn", "blocks.1.ff"}
        f = presence(mixture, text) if reads == "text" else text.mean(1)
        for name, value in observed.values.items():
            assert torch.allclose(value, mixture.gates[name](f), atol=1e-6)

    def test_text_gates_leave_out_the_tokens_that_the_models_mask_leaves_out(self):
        model = Masked()
        x, text = inputs(model)
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings("text", "network"))
        observed = Values()
        with attach(model, mixture) as at, at.watch(observed):
            model(x, text, encoder_attention_mask=torch.tensor([[1, 1, 0], [1, 1, 1]]))
        f = torch.cat([presence(mixture, text[:1, :2]), presence(mixture, text[1:])])
        assert torch.allclose(observed.values[""], mixture.gates[""](f), atol=1e-6)

    def test_watched_text_features_belong_to_the_experts_in_their_order(self):
        """So that gates of fewer experts can drop those of the others."""
        model = Transformer(1)
        x, text = inputs(model)
        pair = lora(model, 1), lora(model, 2)
        owners: list[Tensor | None] = []
        for reads in ("text", "text-mean"):
            mixture = Mixture(pair, GateSet(2, settings(reads, "network"), detector=random_detector(2, FEATURES)))
            with attach(model, mixture) as at, at.watch_inputs(lambda scope, f, owner: owners.append(owner)):
                model(x, text)
        assert owners[0] is not None
        assert owners[0].tolist() == [0, 1]
        assert owners[1] is None

    def test_gates_of_a_block_read_its_input(self):
        """The mean of the hidden states over positions; images have channels first."""
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
            observed = Values()
            with attach(model, mixture) as at, at.watch(observed):
                call(model, x, text)
            handle.remove()
            assert torch.allclose(observed.values[block], mixture.gates[block](stream(caught[0])), atol=1e-6)

    def test_gates_read_the_experts_outputs(self):
        """At the scope's first layer, against the published form computed literally."""
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

    def test_flat_gates_read_all_positions_in_a_row(self):
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
        read_text = presence(mixture, text) if reads == "text" else text.mean(1)
        if reads in ("text", "text-mean"):
            outside = gates[""](read_text)
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
            features = {"hidden": rms_normalised(h).mean(1), "experts": E.mean(1), "flat": E.flatten(1)}
            g = gates[f"blocks.{i}"](features.get(reads, read_text))
            h = F + sum(g[:, j, None, None] * (F_i - F) for j, F_i in enumerate(Fs))
        assert close(found, layer("final", h, outside))

    def test_output_mixing_of_blocks_within_blocks(self):
        """Innermost blocks run once per LoRA and once without; the layers around them are mixed by their deltas."""
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
            "down_blocks.0.resnets.0": 1,  # a hook of another program is called once
            "inner": 3,
        }
        # by hand: blocks of a model whose other layers are merged
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
        """Both read a text that is passed by position."""
        model = Transformer()
        x, text = inputs(model)
        experts = [lora(model, seed) for seed in range(4)]
        first, second = (trained(model, experts[i : i + 2], settings("text", "network")) for i in (0, 2))
        with attach(model, first), attach(model, second):
            found = model(x, text)
        assert untouched(model)
        for row in range(2):
            one = text[row : row + 1]
            gates = [g for m in (first, second) for g in m.gates[""](presence(m, one))[0].tolist()]
            assert close(found[row : row + 1], merged(model, experts, gates)(x[row : row + 1], text[row : row + 1]))


class TestVideoBlocks:
    """Transformers with separate dimensions for frames, rows and columns have channels last, U-Nets first."""

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
        observed = {}
        with (
            attach(model, mixture) as attachment,
            attachment.watch_inputs(lambda scope, f, _: observed.update({scope: f})),
        ):
            model(x)
        assert close(observed["blocks.0"], rms_normalised(x).mean((1, 2, 3)))
