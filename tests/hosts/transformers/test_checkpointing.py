"""Gradients of gates under gradient checkpointing, by `attach` and by the model itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from legomole.core.errors import MergeError
from legomole.core.mole.gates import balance_loss
from legomole.hosts.transformers.mixing import mixed
from torch import Tensor

from ...core.mole.mixtures import gradients
from .tiny_language import (
    CAUSAL,
    MODELS,
    READS,
    WITHOUT_GRADIENTS,
    GateRecorder,
    gate_settings,
    llama,
    mixture,
    padded,
    prompts,
)

pytestmark = WITHOUT_GRADIENTS


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
        """Two forward passes on different texts before the backward one: blocks are recomputed with their own gates."""
        found = []
        for how in ("plain", "attach", "model"):
            if how == "attach" and granularity == "network":
                continue
            model = checkpointed(MODELS[kind]().double(), how)
            mix = mixture(model, gate_settings(reads, granularity, "softmax-null"))
            batches = [padded(prompts(3, 6), "right"), padded(prompts(5, 2, seed=1), "right")]
            with mixed(model, mix, checkpointing=how == "attach") as attachment, torch.enable_grad():
                attachment.bank.gates.double()

                def loss(model=model, attachment=attachment, batches=batches) -> Tensor:
                    total = torch.zeros((), dtype=torch.float64)
                    for inputs in batches:
                        recorder = GateRecorder()
                        with attachment.watch(recorder):
                            scores = model(**inputs, use_cache=False).logits.log_softmax(-1)
                        total = total - scores[:, 0, 3].mean() + 0.1 * balance_loss(list(recorder.passes[0].values()))
                    return total

                found.append(gradients(attachment, loss))
        for other in found[1:]:
            assert other.keys() == found[0].keys()
            for name, gradient in found[0].items():
                assert torch.allclose(gradient, other[name], rtol=1e-8, atol=1e-12), name
        assert all(float(gradient.abs().max()) > 0 for gradient in found[0].values())

    def test_blocks_are_recomputed(self):
        model = checkpointed(llama(), "model")
        runs: list[int] = []
        model.model.layers[0].mlp.register_forward_hook(lambda *_: runs.append(1))
        with mixed(model, mixture(model, gate_settings("hidden"))) as attachment, torch.enable_grad():
            gradients(attachment, lambda: model(prompts(4)[0], use_cache=False).logits.square().mean())
            assert len(runs) == 2
            late = model(prompts(4)[0], use_cache=False).logits.square().mean()
        with torch.enable_grad(), pytest.raises(MergeError, match="detached before the backward pass"):
            late.backward()

    def test_the_models_checkpointing_function_is_restored(self):
        model = checkpointed(llama(), "model")
        before = [m._gradient_checkpointing_func for m in model.model.layers]
        with mixed(model, mixture(model, gate_settings("hidden"))), torch.enable_grad():
            model(prompts(4)[0], use_cache=False)
            assert model.model.layers[0]._gradient_checkpointing_func is not before[0]
        assert all(m._gradient_checkpointing_func is f for m, f in zip(model.model.layers, before, strict=True))

    def test_reentrant_checkpointing_is_refused(self):
        model = llama().train()
        mix = mixture(model, gate_settings("hidden"))
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
        with (
            mixed(model, mix),
            torch.enable_grad(),
            pytest.raises(MergeError, match=r"no gradients[\s\S]*use_reentrant': False"),
        ):
            model(prompts(4)[0], use_cache=False)
