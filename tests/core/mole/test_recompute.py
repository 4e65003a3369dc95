"""Tensors of recomputed blocks are freed with their graph; test_gradients.py tests the values."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.observers import CollectedGates
from torch.utils.checkpoint import checkpoint

from .mixtures import lora, trained
from .models import Transformer, call, inputs, seeded


@pytest.mark.parametrize("by", ["us", "the model"])
@pytest.mark.parametrize("reads", ["text", "hidden", "experts"])
def test_gates_that_were_collected_are_freed(reads: Any, by: str) -> None:
    """The graph keeps the function to run again, the observer keeps gates of the graph: this must not be a cycle."""
    with seeded(0):
        model = Transformer()
    mixture = trained(model, [lora(model, 1), lora(model, 2)], GateSettings(reads=reads))
    with attach(model, mixture, checkpointing=by == "us") as attachment:
        observed = CollectedGates()
        with attachment.watch(observed):
            if by == "us":
                out = call(model, *inputs(model))
            else:

                def run(x: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
                    return call(model, x, text)

                x, text = inputs(model)
                out = checkpoint(attachment.recomputable(run), x.requires_grad_(), text, use_reentrant=True)
        out.sum().backward()  # type: ignore[union-attr]
        kept = [weakref.ref(value) for value in observed.values.values()]
        assert kept
        del out, observed
        gc.collect()
        assert [ref() for ref in kept] == [None] * len(kept)
