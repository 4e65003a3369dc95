"""Detaching restores the model, also if other programs replaced its forward methods."""

from __future__ import annotations

import functools

import pytest
import torch
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.bank import Bank
from legomole.core.mole.mixture import Mixture

from ..merge.pools import close
from .kinds import settings
from .mixtures import Values, lora, trained, untouched
from .models import Transformer, call, inputs

pytestmark = pytest.mark.usefixtures("no_gradients")


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

    def test_three_mixtures_detached_from_below(self):
        model = Transformer()
        x, text = inputs(model)
        base = model(x, text)
        attached = [attach(model, Mixture((lora(model, i),))) for i in range(3)]
        for attachment in attached:
            attachment.detach()
        assert untouched(model)
        assert torch.equal(model(x, text), base)

    def test_forward_methods_below_another_program_do_not_accumulate(self):
        """Another program wraps and restores a forward method several times, each time with a new mixture below."""
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
        """It keeps the method it wrapped and restores it, perhaps after the mixture was detached."""
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
