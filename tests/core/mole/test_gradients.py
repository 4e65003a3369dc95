"""Gradients of the gates: finite differences, and recomputation in the backward pass."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import balance_loss
from legomole.core.mole.recompute import exact_gradients
from torch import Tensor, nn

from .kinds import MODELS, READS, settings
from .mixtures import Values, gradients, lora, trained
from .models import Transformer, UNet, call, inputs

pytestmark = pytest.mark.usefixtures("no_gradients")


class TestGradients:
    """Of a loss through the whole model with respect to the gates; float64, so that finite differences are exact."""

    @staticmethod
    def prepared(kind: str, reads: str, mixing: str = "delta", granularity: str = "block", checkpointing=False):
        model = MODELS[kind]().double()
        mixture = trained(model, (lora(model, 1), lora(model, 2)), settings(reads, granularity, "softmax-null"), mixing)
        attachment = attach(model, mixture, checkpointing=checkpointing)
        attachment.bank.gates.double()
        x, text = inputs(model, dtype=torch.float64)
        target = torch.randn(x.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)

        def loss() -> Tensor:
            observed = Values()
            with attachment.watch(observed), exact_gradients():
                error = (call(model, x, text) - target).square().mean()
            return error + 0.3 * balance_loss(list(observed.values.values()))

        return attachment, loss

    @pytest.mark.parametrize("checkpointing", [False, True])
    @pytest.mark.parametrize(
        ("kind", "reads", "mixing"),
        [(kind, reads, "delta") for kind in MODELS for reads in READS[:3]]
        + [("transformer", "flat", "delta"), ("in place", "hidden", "output"), ("in place", "experts", "output")],
    )
    def test_equal_finite_differences(self, kind, reads, mixing, checkpointing):
        """Along a random direction in all parameters, and along single parameters."""
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

    def test_backward_after_detaching_is_refused(self):
        attachment, loss = self.prepared("in place", "hidden", checkpointing=True)
        with torch.enable_grad():
            total = loss()
        attachment.detach()
        with pytest.raises(MergeError, match=r"detached before the backward pass[\s\S]*double_blocks\.0"):
            total.backward()

    def test_dropout_is_equal_in_the_recomputation(self):
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

    def test_writing_in_place_does_not_change_saved_tensors(self):
        """Plain autograd raises an error; activations with and without gradients must both be saved unchanged."""
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

    def test_weights_are_saved_without_copies(self):
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
