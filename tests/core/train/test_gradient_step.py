"""The gradients of one step: accumulated in parts, and over several devices."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.train import TrainSettings
from legomole.core.train.fit import accumulate_gradients, fit
from torch import Tensor

from .toy import PROMPTS, SETTINGS, Toy, ToyDenoiser, toy


class TestStep:
    def gradients(self, made: Toy, settings: TrainSettings, devices=None) -> tuple[list[Tensor], tuple[float, float]]:
        with made.attached(reads="hidden") as (at, objective):
            outcome = accumulate_gradients(at, objective, settings, 0, devices, at.bank.parameters_of_gates)
            return [p.grad.clone() for p in at.bank.parameters_of_gates], outcome

    @pytest.mark.parametrize("accumulation", [2, 3, 8, 20])
    def test_accumulation_gives_the_same_gradients(self, plain, accumulation):
        whole, outcome = self.gradients(plain, SETTINGS)
        parts, of_parts = self.gradients(plain, SETTINGS.model_copy(update={"accumulation": accumulation}))
        assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(whole, parts, strict=True))
        assert of_parts == pytest.approx(outcome, rel=1e-5)

    @pytest.mark.parametrize(("world", "batch"), [(2, 8), (3, 8), (4, 2)])
    def test_several_devices_give_the_gradients_of_one(self, world, batch):
        """Threads with their own models; also if a batch does not divide evenly, or some threads get no example."""
        settings = SETTINGS.model_copy(update={"batch": batch})
        made = toy()
        whole, outcome = self.gradients(made, settings)
        together = Together(world)
        found: dict[int, tuple[list[Tensor], tuple[float, float]]] = {}

        def work(rank: int) -> None:
            model = copy.deepcopy(made.model)
            mine = Toy(model, made.experts, ToyDenoiser(model, PROMPTS), made.examples)
            found[rank] = self.gradients(mine, settings, Device(rank, together))

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert len(found) == world
        for gradients, of_rank in found.values():
            assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-6) for a, b in zip(whole, gradients, strict=True))
            assert of_rank == pytest.approx(outcome, rel=1e-5)

    def test_a_model_that_opens_no_gate(self, plain):
        class Blind:
            size = 8

            def loss(self, indices: Sequence[int]) -> Tensor:
                return torch.zeros((), requires_grad=True)

        with plain.attached() as (at, _), pytest.raises(MergeError, match=r"No gate opened[\s\S]*torch\.compile"):
            fit(at, Blind(), SETTINGS)


class Together:
    """The mean over all threads."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.tensors: dict[int, Tensor] = {}


@dataclass
class Device:
    rank: int
    together: Together

    @property
    def world(self) -> int:
        return self.together.world

    def mean(self, tensor: Tensor) -> Tensor:
        self.together.tensors[self.rank] = tensor.detach().clone()
        self.together.barrier.wait()
        mean = torch.stack([self.together.tensors[rank] for rank in range(self.world)]).mean(0)
        self.together.barrier.wait()
        return mean
