"""fit(): the loss falls, only gates learn, and nothing is lost when it is interrupted, by force or by bad numbers."""

from __future__ import annotations

import copy
import math
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import legomole
import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import FormatError, MergeError
from legomole.core.formats.files import read_tensors, write_tensors
from legomole.core.mole.attach import Attachment, attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import TrainSettings, prompts_for
from legomole.core.train.examples import Examples, make_examples
from legomole.core.train.features import standardise_features
from legomole.core.train.fit import FitRecord, accumulate_gradients, batch_of, fit, has_stalled, schedule
from legomole.core.train.objectives import Regression
from torch import Tensor, nn

from ..mole.models import InPlace, ToyDenoiser, Transformer, lora

PROMPTS = prompts_for([["ember"], ["heart"]], ["ember", "heart", "ember heart", "a dog"])
SETTINGS = TrainSettings(steps=12, batch=8, examples=32, samples=16, warmup=2, learning_rate=0.03)


@dataclass
class Toy:
    model: nn.Module
    experts: tuple[Adapter, Adapter]
    denoiser: ToyDenoiser
    examples: Examples

    @contextmanager
    def attached(self, checkpointing: bool = False, **settings) -> Iterator[tuple[Attachment, Regression]]:
        """With calibrated gates, always the same."""
        mixture = Mixture(self.experts, GateSet(2, GateSettings(**settings)))
        with attach(self.model, mixture, checkpointing=checkpointing) as at:
            e = self.examples
            standardise_features(at, lambda: self.denoiser.predict(e.noisy, e.t, e.prompt.tolist()))
            yield at, Regression(self.denoiser, e)

    def trained(self, settings: TrainSettings = SETTINGS, reads: str = "text", **kw) -> tuple[list[Tensor], FitRecord]:
        with self.attached(reads=reads) as (at, objective):
            run = fit(at, objective, settings, **kw)
            return values(at), run


def toy(make: type[nn.Module] = Transformer) -> Toy:
    model = make(1)
    experts = lora(model, 1), lora(model, 2)
    denoiser = ToyDenoiser(model, PROMPTS)
    with attach(model, Mixture(experts)) as at:
        return Toy(model, experts, denoiser, make_examples(at, denoiser, PROMPTS, SETTINGS))


@pytest.fixture(scope="module")
def plain() -> Toy:
    return toy()


def values(at: Attachment) -> list[Tensor]:
    return [p.detach().clone() for p in at.bank.gates.parameters()]


def equal(one: Sequence[Tensor], other: Sequence[Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


class Stop(Exception):
    pass


def stopping(at: int):
    def progress(done: int, total: int, what: str) -> None:
        if done == at:
            raise Stop

    return progress


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
        """All of the examples in one batch: the mean squared error of the plain sum of the LoRAs."""
        with plain.attached(reads="hidden") as (at, objective):
            run = fit(at, objective, SETTINGS.model_copy(update={"steps": 1, "batch": 32}))
        e = plain.examples
        with torch.no_grad(), attach(plain.model, Mixture(plain.experts)):
            error = plain.denoiser.predict(e.noisy, e.t, e.prompt.tolist()) - e.target
        assert run.losses == [pytest.approx(float(error.square().mean()), rel=1e-5)]
        assert run.entropies == [pytest.approx(math.log(2))]

    def test_a_step_is_adamws(self, plain):
        settings = SETTINGS.model_copy(update={"steps": 2, "batch": 32, "warmup": 1, "weight_decay": 0.1})
        found, _ = plain.trained(settings)
        with plain.attached(reads="text") as (at, objective):
            parameters = at.bank.parameters_of_gates
            optimizer = torch.optim.AdamW(parameters, lr=0.03, weight_decay=0.1)
            for rate in (0.03 / 2, 0.03):  # half of the way up, then the top
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
        """Examples of the first LoRA alone: without it, one expert takes all."""
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
        """Threads, each with a model of its own; also where a batch does not go up, or leaves some with nothing."""
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

    def test_a_model_whose_gates_are_not_seen(self, plain):
        class Blind:
            size = 8

            def loss(self, indices: Sequence[int]) -> Tensor:
                return torch.zeros((), requires_grad=True)

        with plain.attached() as (at, _), pytest.raises(MergeError, match=r"No gate opened[\s\S]*torch\.compile"):
            fit(at, Blind(), SETTINGS)


class Together:
    """The mean of what all threads bring."""

    def __init__(self, world: int) -> None:
        self.world, self.barrier = world, threading.Barrier(world, timeout=60)
        self.brought: dict[int, Tensor] = {}


@dataclass
class Device:
    rank: int
    together: Together

    @property
    def world(self) -> int:
        return self.together.world

    def mean(self, tensor: Tensor) -> Tensor:
        self.together.brought[self.rank] = tensor.detach().clone()
        self.together.barrier.wait()
        mean = torch.stack([self.together.brought[rank] for rank in range(self.world)]).mean(0)
        self.together.barrier.wait()
        return mean


class TestResume:
    @pytest.mark.parametrize("at", [1, 7, 12])
    def test_after_an_exception_at_any_step(self, plain, at, tmp_path: Path):
        whole, run = plain.trained()
        with pytest.raises(Stop):
            plain.trained(folder=tmp_path, key="k", progress=stopping(at))
        resumed, again = plain.trained(folder=tmp_path, key="k")
        assert equal(resumed, whole)
        assert (again.losses, again.entropies) == (run.losses, run.entropies)

    def test_after_two_of_them_with_another_kind_of_gate(self, plain, tmp_path: Path):
        kw = {"folder": tmp_path / "new" / "folder", "key": "k", "reads": "experts"}
        whole, _ = plain.trained(reads="experts")
        for at in (3, 4):
            with pytest.raises(Stop):
                plain.trained(progress=stopping(at), **kw)
        assert equal(plain.trained(**kw)[0], whole)

    def test_an_error_of_the_model_costs_no_step(self, plain, tmp_path: Path):
        class Failing(Regression):
            calls = 0

            def loss(self, indices: Sequence[int]) -> Tensor:
                self.calls += 1
                if self.calls == 6:
                    raise MemoryError
                return super().loss(indices)

        whole, _ = plain.trained()
        with plain.attached() as (at, objective), pytest.raises(MemoryError):
            fit(at, Failing(objective.denoiser, objective.examples), SETTINGS, folder=tmp_path, key="k")
        done: list[int] = []
        found, _ = plain.trained(folder=tmp_path, key="k", progress=lambda done_, *_: done.append(done_))
        assert done[0] == 6
        assert equal(found, whole)

    def test_killed(self, plain, tmp_path: Path):
        """A process that cannot say goodbye: it goes on from the last state that was kept."""
        settings = SETTINGS.model_copy(update={"steps": 30})
        root = Path(legomole.__file__).parent
        code = (
            f"import os, signal, sys; sys.path.append({str(root)!r})\n"
            "import torch; torch.set_num_threads(1)\n"
            "from pathlib import Path\n"
            "from tests.core.train.test_fit import SETTINGS, toy\n"
            "def kill(done, total, what):\n"
            "    if done == 27: os.kill(os.getpid(), signal.SIGKILL)\n"
            "longer = SETTINGS.model_copy(update={'steps': 30})\n"
            "toy().trained(longer, folder=Path(sys.argv[1]), key='k', progress=kill)\n"
        )
        env = os.environ | {"PYTHONSAFEPATH": "1"}
        done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], env=env, capture_output=True, text=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        steps: list[int] = []
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            found, run = plain.trained(settings, folder=tmp_path, key="k", progress=lambda d, *_: steps.append(d))
            whole, uninterrupted = plain.trained(settings)
        finally:
            torch.set_num_threads(threads)
        assert steps == [26, 27, 28, 29, 30]
        assert equal(found, whole)
        assert run.losses == uninterrupted.losses

    def test_a_caller_may_see_how_far_it_went(self, plain):
        run = FitRecord()
        with pytest.raises(Stop):
            plain.trained(progress=stopping(5), record=run)
        assert len(run.losses) == 5

    def test_another_training_in_the_folder(self, plain, tmp_path: Path):
        with pytest.raises(Stop):
            plain.trained(folder=tmp_path, key="k", progress=stopping(3))
        before = (tmp_path / "state.safetensors").read_bytes()
        with pytest.raises(FormatError, match=r"another training[\s\S]*state\.safetensors[\s\S]*other[\s\S]*found: +k"):
            plain.trained(folder=tmp_path, key="other")
        assert (tmp_path / "state.safetensors").read_bytes() == before

    def test_a_damaged_state(self, plain, tmp_path: Path):
        path = tmp_path / "state.safetensors"
        with pytest.raises(Stop):
            plain.trained(folder=tmp_path, key="k", progress=stopping(3))
        sound = path.read_bytes()
        path.write_bytes(sound[:-20])
        with pytest.raises(FormatError, match=r"cut off[\s\S]*state\.safetensors[\s\S]*start again"):
            plain.trained(folder=tmp_path, key="k")
        path.write_bytes(b"not a file of ours")
        with pytest.raises(FormatError, match=r"state\.safetensors[\s\S]*start again"):
            plain.trained(folder=tmp_path, key="k")
        path.write_bytes(sound)
        tensors, header = read_tensors(path)
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        for changed, said in (
            ((tensors, header | {"run": "{"}), "Expecting"),
            ((tensors, header | {"run": "[1]"}), "indices"),
            ((tensors | {"0/value": torch.zeros(7)}, header), "size"),
            (({n: t for n, t in tensors.items() if n != "0/value"}, header), "0/value"),
            ((tensors | {"0/value": tensors["0/value"][None]}, header), "size"),
            ((tensors | {"0/exp_avg": torch.zeros(7)}, header), "size"),
            (({n: t for n, t in tensors.items() if n != "0/exp_avg"}, header), "size or kind"),
            ((tensors, header | {"run": '{"losses": ["x"], "entropies": []}'}), "could not convert"),
            ((tensors, header | {"run": "[" * 10_000}), "levels deep"),
        ):
            write_tensors(path, *changed)
            with pytest.raises(FormatError, match=rf"cannot be resumed[\s\S]*{said}[\s\S]*start again"):
                plain.trained(folder=tmp_path, key="k")


class Poisoned(Regression):
    """A loss that is not a number from one step on."""

    def __init__(self, objective: Regression, step: int, gradient: bool = False) -> None:
        super().__init__(objective.denoiser, objective.examples)
        self.step, self.gradient, self.calls = step, gradient, 0

    def loss(self, indices: Sequence[int]) -> Tensor:
        loss = super().loss(indices)
        self.calls += 1
        if self.calls <= self.step:
            return loss
        if self.gradient:  # the loss is a number, its gradient is none: sqrt at 0
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
    def test_later_it_keeps_the_last_good_gates_and_says_so(self, plain, gradient):
        """Those of the last step whose loss was known: the step after it may be what spoilt them."""
        with plain.attached() as (at, objective):
            run = fit(at, Poisoned(objective, 5, gradient), SETTINGS)
            found = values(at)
        assert len(run.losses) == 5
        said = "its gradient was not finite" if gradient else "the loss became nan"
        assert run.stopped == f"{said} at step 6; the gates are those of the step before"
        with plain.attached() as (at, objective), pytest.raises(Stop):
            fit(at, objective, SETTINGS, progress=stopping(4))
        assert equal(found, values(at))
        assert all(torch.isfinite(p).all() for p in found)

    def test_a_last_step_that_overflows(self, plain):
        settings = TrainSettings(steps=1, batch=8, warmup=0, learning_rate=1e30, weight_decay=1e8)
        with plain.attached() as (at, objective):
            with torch.no_grad():
                for p in at.bank.parameters_of_gates:
                    p.add_(10.0)  # the decay makes it -1e39
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

    def test_stops_and_says_so(self, plain):
        """Gates that do not learn at all: no improvement between the first and the second half."""
        settings = SETTINGS.model_copy(update={"steps": 40, "batch": 32, "learning_rate": 1e-30, "patience": 4})
        _, run = plain.trained(settings)
        assert len(run.losses) == 8
        assert run.stopped == "the loss had not improved for 4 steps, at step 8"

    def test_goes_on_while_it_improves(self, plain):
        _, run = plain.trained(SETTINGS.model_copy(update={"batch": 32, "patience": 2}))
        assert len(run.losses) == 12


class TestSchedules:
    def test_rate_by_hand(self):
        # up in thirds to the top at step 2, then half a cosine over the 4 steps from there
        expected = [1 / 3, 2 / 3, 1.0, 0.5 * (1 + math.cos(math.pi / 4)), 0.5, 0.5 * (1 + math.cos(3 * math.pi / 4))]
        assert [schedule(step, 6, 2) for step in range(6)] == pytest.approx(expected)
        assert schedule(0, 1, 0) == 1.0
        assert schedule(0, 1, 10) == pytest.approx(1 / 11)

    def test_batches_go_through_all_examples_in_turn(self):
        drawn = [i for step in range(7) for i in batch_of(step, 10, 4, 0)]  # 28: two whole passes and more
        for start in (0, 10):
            assert sorted(drawn[start : start + 10]) == list(range(10))
        assert drawn[:10] != drawn[10:20]
        assert batch_of(3, 10, 4, 0) == drawn[12:16]
        assert batch_of(0, 10, 4, 1) != drawn[:4]
        assert len(batch_of(0, 3, 8, 0)) == 8  # more than there are


def test_the_temperature_of_a_softmax_is_learnt_too(plain):
    with plain.attached(activation="softmax") as (at, objective):
        fit(at, objective, SETTINGS.model_copy(update={"steps": 3}))
        assert at.bank.gates["blocks.0.ff"].log_temperature.tolist() != 0.0
