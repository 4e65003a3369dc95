"""fit(): the loss falls and only gates learn; schedules, early stopping, and losses that are not finite."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.mixture import Mixture
from legomole.core.train import TrainSettings
from legomole.core.train.examples import Examples
from legomole.core.train.fit import batch_of, fit, has_stalled, schedule
from legomole.core.train.objectives import Regression
from torch import Tensor

from ..mole.models import InPlace
from .toy import PROMPTS, SETTINGS, Stop, equal, stopping, toy, values


class TestLearning:
    @pytest.mark.parametrize("reads", ["text", "hidden", "experts", "flat"])
    def test_the_loss_falls_and_only_gates_learn(self, plain, reads):
        weights = copy.deepcopy(plain.model.state_dict())
        factors = [(part.A.clone(), part.B.clone()) for e in plain.experts for part in e.modules.values()]
        with plain.attached(reads=reads) as (at, objective):
            stacks = {path: copy.deepcopy(stack.state_dict()) for path, stack in at.bank.stacks.items()}
            run = fit(at, objective, SETTINGS.model_copy(update={"steps": 25, "batch": 32}))
            for path, stack in at.bank.stacks.items():
                assert all(torch.equal(tensor, stacks[path][name]) for name, tensor in stack.state_dict().items())
        assert len(run.losses) == len(run.entropies) == 25
        assert not run.stopped
        assert run.losses[-1] < 0.85 * run.losses[0]
        assert all(torch.equal(tensor, weights[name]) for name, tensor in plain.model.state_dict().items())
        assert all(p.grad is None for p in plain.model.parameters())
        after = [(part.A, part.B) for e in plain.experts for part in e.modules.values()]
        assert all(torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(factors, after, strict=True))

    def test_the_first_loss_by_hand(self, plain):
        """All examples in one batch: the mean squared error of the plain sum of the LoRAs."""
        with plain.attached(reads="hidden") as (at, objective):
            run = fit(at, objective, SETTINGS.model_copy(update={"steps": 1, "batch": 32}))
        e = plain.examples
        with torch.no_grad(), attach(plain.model, Mixture(plain.experts)):
            error = plain.denoiser.predict(e.noisy, e.t, e.prompt.tolist()) - e.target
        assert run.losses == [pytest.approx(float(error.square().mean()), rel=1e-5)]
        assert run.entropies == [pytest.approx(math.log(2))]

    def test_steps_equal_adamw(self, plain):
        settings = SETTINGS.model_copy(update={"steps": 2, "batch": 32, "warmup": 1, "weight_decay": 0.1})
        found, _ = plain.trained(settings)
        with plain.attached(reads="text") as (at, objective):
            parameters = at.bank.parameters_of_gates
            optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1)
            for rate in (0.03 / 2, 0.03):  # half of the warmup, then the peak
                optimizer.param_groups[0]["lr"] = rate
                optimizer.zero_grad()
                objective.loss(range(32)).backward()
                optimizer.step()
            for p, q in zip(values(at), found, strict=True):
                assert torch.allclose(p, q, atol=1e-4)

    def test_the_same_seed_gives_the_same_gates(self, plain):
        assert equal(plain.trained()[0], plain.trained()[0])
        assert not equal(plain.trained()[0], plain.trained(SETTINGS.model_copy(update={"seed": 1}))[0])

    def test_the_balance_loss_keeps_the_entropy_up(self, plain):
        """With examples of the first LoRA only, one expert takes all without it."""
        one = [i for i, p in enumerate(plain.examples.prompt.tolist()) if PROMPTS[p].named == (0,)]
        e = plain.examples
        only = Examples(e.noisy[one], e.t[one], e.prompt[one], e.target[one])
        ends = {}
        for balance in (0.0, 0.5):
            settings = TrainSettings(steps=40, batch=len(one), learning_rate=0.1, warmup=0, balance=balance)
            with plain.attached(reads="hidden", activation="softmax") as (at, _):
                run = fit(at, Regression(plain.denoiser, only), settings)
            assert run.entropies[0] == pytest.approx(math.log(2), rel=1e-4)
            ends[balance] = run.entropies[-1]
        assert ends[0.0] < 0.3 * math.log(2)
        assert ends[0.5] > 0.8 * math.log(2)

    @pytest.mark.parametrize("reads", ["text", "hidden", "experts"])
    def test_checkpointing_with_blocks_that_work_in_place(self, reads):
        made = toy(InPlace)
        found = []
        for checkpointing in (False, True):
            with made.attached(checkpointing, reads=reads, activation="softmax") as (at, objective):
                run = fit(at, objective, SETTINGS.model_copy(update={"steps": 4, "balance": 0.3}))
                found.append((run, values(at)))
        (one, plain), (other, checkpointed) = found
        assert one.losses == pytest.approx(other.losses, rel=1e-5)
        assert one.entropies == pytest.approx(other.entropies, rel=1e-5)
        assert all(torch.allclose(p, q, atol=1e-4) for p, q in zip(plain, checkpointed, strict=True))


class Poisoned(Regression):
    """A loss that is NaN from one step on."""

    def __init__(self, objective: Regression, step: int, gradient: bool = False) -> None:
        super().__init__(objective.denoiser, objective.examples)
        self.step, self.gradient, self.calls = step, gradient, 0

    def loss(self, indices: Sequence[int]) -> Tensor:
        loss = super().loss(indices)
        self.calls += 1
        if self.calls <= self.step:
            return loss
        if self.gradient:  # the loss is finite, its gradient is not: sqrt at 0
            return loss + (loss - loss.detach()).sqrt()
        return loss * float("nan")


class TestNotFinite:
    def test_from_the_start(self, plain, tmp_path: Path):
        with plain.attached() as (at, objective):
            before = values(at)
            with pytest.raises(MergeError, match=r"not finite at the first step[\s\S]*float32"):
                fit(at, Poisoned(objective, 0), SETTINGS, folder=tmp_path)
            assert equal(values(at), before)
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize("gradient", [False, True])
    def test_later_the_last_good_gates_are_kept(self, plain, gradient):
        """The gates of the last step with a finite loss: the step after it may have made them NaN."""
        with plain.attached() as (at, objective):
            run = fit(at, Poisoned(objective, 5, gradient), SETTINGS)
            found = values(at)
        assert len(run.losses) == 5
        reason = "its gradient was not finite" if gradient else "the loss became nan"
        assert run.stopped == f"{reason} at step 6; the gates are those of the step before"
        with plain.attached() as (at, objective), pytest.raises(Stop):
            fit(at, objective, SETTINGS, progress=stopping(4))
        assert equal(found, values(at))
        assert all(torch.isfinite(p).all() for p in found)

    def test_a_last_step_that_overflows(self, plain):
        settings = TrainSettings(steps=1, batch=8, warmup=0, learning_rate=1e30, weight_decay=1e8)
        with plain.attached() as (at, objective):
            with torch.no_grad():
                for p in at.bank.parameters_of_gates:
                    p.add_(10.0)  # weight decay makes it -1e39
            before = values(at)
            run = fit(at, objective, settings)
            assert equal(values(at), before)
        assert "not finite" in run.stopped


class TestEarlyStop:
    def test_by_hand(self):
        # means of two: 4.5, 3.5, 3, 3: the last is no lower than the one before
        assert not has_stalled([5.0, 4.0], 2)
        assert not has_stalled([5.0, 4.0, 3.0], 2)
        assert not has_stalled([5.0, 4.0, 3.0, 3.0], 2)
        assert has_stalled([5.0, 4.0, 3.0, 3.0, 3.0, 3.0], 2)

    def test_stops_and_reports_why(self, plain):
        """Gates that do not learn: no improvement from the first to the second half."""
        settings = SETTINGS.model_copy(update={"steps": 40, "batch": 32, "learning_rate": 1e-30, "patience": 4})
        _, run = plain.trained(settings)
        assert len(run.losses) == 8
        assert run.stopped == "the loss had not improved for 4 steps, at step 8"

    def test_continues_while_it_improves(self, plain):
        _, run = plain.trained(SETTINGS.model_copy(update={"batch": 32, "patience": 2}))
        assert len(run.losses) == 12


class TestSchedules:
    def test_rate_by_hand(self):
        # in thirds to the peak at step 2, then half a cosine over the remaining 4 steps
        expected = [1 / 3, 2 / 3, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]
        assert [schedule(step, 6, 2) for step in range(6)] == pytest.approx(expected)
        assert schedule(0, 1, 0) == 1.0
        assert schedule(0, 1, 10) == pytest.approx(1 / 11)

    def test_batches_go_through_all_examples_in_turn(self):
        drawn = [i for step in range(7) for i in batch_of(step, 10, 4, 0)]  # 28: two complete epochs and more
        for start in (0, 10):
            assert sorted(drawn[start : start + 10]) == list(range(10))
        assert drawn[:10] != drawn[10:20]
        assert batch_of(3, 10, 4, 0) == drawn[12:16]
        assert batch_of(0, 10, 4, 1) != drawn[:4]
        assert len(batch_of(0, 3, 8, 0)) == 8  # more than there are examples


def test_the_temperature_of_a_softmax_is_trained_too(plain):
    with plain.attached(activation="softmax") as (at, objective):
        fit(at, objective, SETTINGS.model_copy(update={"steps": 3}))
        assert at.bank.gates["blocks.0.ff"].log_temperature.tolist() != 0.0
