"""Negative prompts get the gates of their prompt: in one batch, in two passes, with prompts of several parts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from legomole.core.mole.attach import attach
from legomole.core.mole.concepts import ConceptDetector
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.guidance import PromptGateSharing, PromptPassRequired
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.router import route_gates
from torch import Tensor

from ..merge.pools import close
from .mixtures import Values, lora, trained
from .models import FEATURES, Transformer, call, inputs


def following(*own: int) -> PromptGateSharing:
    """For batches in which these rows are the prompt's."""
    return PromptGateSharing(lambda _, batch: [row for row in own if row < batch])


def rows(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None]


class TestByHand:
    @pytest.mark.parametrize(
        ("own", "values", "expected"),
        [
            ((0,), (1, 9), (1, 1)),
            ((1,), (9, 1), (1, 1)),
            ((2, 3), (8, 9, 1, 2), (1, 2, 1, 2)),  # two images, negative prompts first
            ((0, 1), (1, 2, 8, 9), (1, 2, 1, 2)),
            ((0, 1, 2, 3), (1, 2, 3, 5, 8, 9), (1, 2, 3, 5, 2, 3.5)),  # a prompt of two parts: their mean
            ((0,), (1, 8, 9), (1, 1, 1)),  # a negative prompt of two parts
            ((0, 1), (1, 2), (1, 2)),
        ],
    )
    def test_in_one_batch(self, own, values, expected):
        follow = following(*own)
        for _ in range(2):  # the next step is no other
            follow.begin_pass({}, len(values))
            assert torch.equal(follow("scope", rows(*values)), rows(*expected))

    def test_in_two_passes(self):
        prompt = [True]
        follow = PromptGateSharing(lambda _, batch: range(batch) if prompt[0] else [], separate_passes=True)

        def one(of_prompt: bool, *values: float) -> list[float]:
            prompt[0] = of_prompt
            follow.begin_pass({}, len(values))
            return follow("scope", rows(*values))[:, 0].tolist()

        assert one(False, 9) == [9]  # no prompt's gates yet
        assert one(True, 1, 2) == [1, 2]
        assert one(False, 8, 9) == [1, 2]
        assert one(False, 8, 9) == [1, 2]
        follow.begin_step()
        assert one(True, 3, 4) == [3, 4]  # a prompt of two parts
        assert one(True, 5, 8) == [5, 8]
        assert one(False, 8, 9) == [4, 6]
        follow.begin_step()
        assert one(False, 8, 9) == [4, 6]  # before the prompt in a later step: the gates of the step before
        assert one(True, 7, 7) == [7, 7]
        assert one(False, 8, 9) == [7, 7]
        follow.forget()
        assert one(False, 8, 9) == [8, 9]

    def test_a_negative_prompt_that_comes_first_raises(self):
        prompt = [False]
        follow = PromptGateSharing(lambda _, batch: range(batch) if prompt[0] else [], separate_passes=True)
        follow.require_prompt_first = True
        with pytest.raises(PromptPassRequired):
            follow.begin_pass({}, 1)
        prompt[0] = True
        follow.begin_pass({}, 1)
        prompt[0] = False
        follow.begin_pass({}, 1)  # even if the prompt's pass opened no gate
        follow.begin_step()
        with pytest.raises(PromptPassRequired):
            follow.begin_pass({}, 1)

    def test_scopes_are_independent_and_values_for_all_samples_stay(self):
        follow = following(0)
        follow.begin_pass({}, 2)
        assert torch.equal(follow("a", rows(1, 9)), rows(1, 1))
        assert torch.equal(follow("b", rows(2, 9)), rows(2, 2))
        assert torch.equal(follow("c", rows(5)), rows(5))

    def test_a_concept_that_another_prompt_names_keeps_its_own_gate(self):
        follow = following(1)
        follow.begin_pass({}, 2)
        values = torch.tensor([[0.9, 0.1], [0.2, 0.8]])
        named = torch.tensor([[True, False], [False, True]])
        assert torch.equal(follow("a", values, named), torch.tensor([[0.9, 0.8], [0.2, 0.8]]))

    def test_a_concept_that_is_named_in_a_pass_of_its_own(self):
        prompt = [True]
        follow = PromptGateSharing(lambda _, batch: range(batch) if prompt[0] else [], separate_passes=True)
        follow.begin_pass({}, 1)
        follow("a", torch.tensor([[0.9, 0.1]]), torch.tensor([[True, False]]))
        prompt[0] = False
        follow.begin_pass({}, 1)
        found = follow("a", torch.tensor([[0.2, 0.8]]), torch.tensor([[False, True]]))
        assert torch.equal(found, torch.tensor([[0.9, 0.8]]))

    def test_the_prompts_own_pass_replaces_gates_that_were_given(self):
        """Also in the first step, in which the other prompt came first."""
        prompt = [False]
        follow = PromptGateSharing(
            lambda _, batch: range(batch) if prompt[0] else [], separate_passes=True, texts=lambda _: []
        )
        follow.begin_pass({}, 1)
        follow.remember({"scope": [rows(3)]})
        assert follow("scope", rows(9)).tolist() == [[3.0]]
        prompt[0] = True
        follow.begin_pass({}, 1)
        assert follow("scope", rows(5)).tolist() == [[5.0]]
        prompt[0] = False
        follow.begin_pass({}, 1)
        assert follow("scope", rows(9)).tolist() == [[5.0]]

    def test_one_text_for_all_samples_of_another_prompt(self):
        """A pipeline may pass a negative prompt once for a batch of images."""
        prompt = [True]
        follow = PromptGateSharing(lambda _, batch: range(batch) if prompt[0] else [], separate_passes=True)
        follow.begin_pass({}, 2)
        follow("a", torch.tensor([[0.9, 0.1], [0.7, 0.3]]))
        prompt[0] = False
        follow.begin_pass({}, 2)
        found = follow("a", torch.tensor([[0.2, 0.8]]), torch.tensor([[False, True]]))
        assert torch.equal(found, torch.tensor([[0.9, 0.8], [0.7, 0.8]]))
        assert torch.equal(follow("b", rows(5)), rows(5))  # the prompt's gates are unknown

    def test_parts_of_a_prompt_in_passes_of_different_sizes(self):
        """Three parts of one sample, two of them in one pass: their mean."""
        own: list[int] = []
        follow = PromptGateSharing(lambda _, batch: own, separate_passes=True)
        for own, values in (([0, 1], (3, 6)), ([0], (9,)), ([], (1,))):  # noqa: B007
            follow.begin_pass({}, len(values))
            found = follow("scope", rows(*values))
        assert torch.equal(found, rows(6))

    def test_gates_of_an_earlier_step_are_only_used_until_the_prompt_passes_again(self):
        """Scope by scope: a scope that the prompt's next pass does not reach keeps them."""
        prompt = [True]
        follow = PromptGateSharing(lambda _, batch: range(batch) if prompt[0] else [], separate_passes=True)
        follow.begin_pass({}, 1)
        follow("a", rows(1)), follow("b", rows(2))
        follow.begin_step()
        follow.begin_pass({}, 1)
        follow("a", rows(5))
        prompt[0] = False
        follow.begin_pass({}, 1)
        assert (float(follow("a", rows(9))), float(follow("b", rows(9)))) == (5, 2)

    def test_without_separate_passes_nothing_is_remembered(self):
        prompt = [True]
        follow = PromptGateSharing(lambda _, batch: range(batch) if prompt[0] else [])
        follow.begin_pass({}, 1)
        follow("a", rows(1))
        prompt[0] = False
        follow.begin_pass({}, 1)
        assert float(follow("a", rows(9))) == 9

    def test_gates_given_for_a_pass_without_the_prompt(self):
        texts = [(torch.zeros(1, 2, 3), None)]
        asked: list[Any] = []

        def prompt_texts(arguments: Any) -> Any:
            asked.append(arguments)
            return texts

        follow = PromptGateSharing(lambda _, batch: [], separate_passes=True, texts=prompt_texts)
        follow.begin_pass({"a": 1}, 2)
        assert follow.prompt_texts({"a": 1}) is texts
        assert asked == [{"a": 1}]
        follow.remember({"scope": [rows(3), rows(5)]})
        assert torch.equal(follow("scope", rows(8, 9)), rows(4, 4))  # two parts, for both samples
        follow.remember({"scope": [rows(3, 4), rows(5, 8)]})
        assert torch.equal(follow("scope", rows(8, 9)), rows(4, 6))  # two parts of two samples each
        inside = PromptGateSharing(lambda _, batch: [0], separate_passes=True, texts=prompt_texts)
        inside.begin_pass({}, 2)
        assert inside.prompt_texts({}) == []  # the prompt is in this pass


def quiet(mixture: Mixture, text: Tensor) -> Mixture:
    """The mixture with a detector that finds no concept in these texts: the largest presence is 0.45."""
    gates = mixture.gates
    detector = gates.detector
    if detector is None:
        return mixture
    largest = torch.logit(detector(text)).max()
    other = ConceptDetector(detector.weight, detector.bias - largest - 0.2, detector.words)
    return replace(mixture, gates=GateSet(gates.experts, gates.settings, {n: gates[n] for n in gates.names}, other))


@pytest.mark.parametrize("reads", ["text", "hidden", "experts"])
@pytest.mark.parametrize("mixing", ["delta", "output"])
def test_both_halves_of_a_guided_batch_use_the_gates_of_the_prompt(reads, mixing):
    model = Transformer(1)
    settings = GateSettings(reads=reads, granularity="block")
    pair = (lora(model, 1), lora(model, 2))
    x, text = inputs(model)  # two samples
    mixture = quiet(trained(model, pair, settings, mixing), text)
    with torch.no_grad():
        own, both = Values(), Values()
        with attach(model, mixture) as attachment, attachment.watch(own):
            apart = call(model, x, text)
        arguments: list[Any] = []

        def second(given: Any, batch: int) -> range:
            arguments.append(given)
            return range(batch // 2, batch)

        with attach(model, mixture, prompt_rows=second) as attachment, attachment.watch(both):
            together = call(model, x, text)
    assert len(arguments) == 1
    assert close(together[1:], apart[1:])
    assert not close(together[:1], apart[:1], 1e-3)
    for scope, value in both.values.items():
        assert torch.equal(value[0], value[1])
        first = next(iter(own.values))
        if scope == first:  # the first gate reads an input that the negative prompt does not change
            assert torch.equal(value[1], own.values[scope][1])


ROLES = ("prompt", "negative", "empty")


class Roles:
    """Finds the rows of the prompt by the names that a caller gives to its rows."""

    def __init__(self) -> None:
        self.roles: Sequence[str] = ()

    def __call__(self, arguments: Any, batch: int) -> list[int]:
        return [row for row, role in enumerate(self.roles) if role == "prompt"]


class TestThreePredictions:
    """A guider that asks for the predictions of a prompt, a negative and an empty prompt."""

    @pytest.fixture(params=["text", "text-mean", "hidden"])
    def mixture(self, request: pytest.FixtureRequest) -> Mixture:
        model = Transformer(1)
        settings = GateSettings(reads=request.param, granularity="block")
        return quiet(trained(model, (lora(model, 1), lora(model, 2)), settings), inputs(model, 3)[1])

    def sampled(self, mixture: Mixture, order: Sequence[str], at_once: bool, steps: int = 2) -> list[dict[str, Tensor]]:
        """The output for each prompt, step by step."""
        model, roles = Transformer(1), Roles()
        sharing = PromptGateSharing(roles, separate_passes=True)
        x, text = inputs(model, 3)
        row_of = {role: slice(i, i + 1) for i, role in enumerate(ROLES)}
        found: list[dict[str, Tensor]] = []
        with torch.no_grad(), attach(model, mixture, prompt_rows=sharing):
            for step in range(steps):
                sharing.begin_step()
                y = (1 + step) * x[:1]  # the same image for all three
                outputs: dict[str, Tensor] = {}
                for roles.roles in [order] if at_once else [(role,) for role in order]:
                    rows = torch.cat([text[row_of[role]] for role in roles.roles])
                    out = call(model, y.expand(len(rows), -1, -1), rows)
                    outputs |= dict(zip(roles.roles, out.split(1), strict=True))
                found.append(outputs)
        return found

    @pytest.mark.parametrize("order", [ROLES, ("negative", "prompt", "empty"), ("empty", "negative", "prompt")])
    def test_one_at_a_time_equals_all_at_once(self, mixture: Mixture, order: Sequence[str]):
        """Before the prompt's first pass nothing is known, so the order counts there; see `require_prompt_first`."""
        together = self.sampled(mixture, ROLES, True)
        shuffled = self.sampled(mixture, order, True)
        single = self.sampled(mixture, order, False)
        for step in range(2):
            for role in ROLES:
                assert close(shuffled[step][role], together[step][role])
                late = order.index(role) >= order.index("prompt")
                if late or (step > 0 and mixture.gates.settings.reads != "hidden"):
                    assert close(single[step][role], together[step][role]), (step, role)

    @pytest.mark.parametrize("mixture", ["text", "text-mean"], indirect=True)
    def test_a_pass_without_the_prompt_computes_its_gates_from_its_text(self, mixture: Mixture):
        """Then even the first of all passes follows the prompt."""
        model, roles = Transformer(1), Roles()
        x, text = inputs(model, 3)
        sharing = PromptGateSharing(roles, separate_passes=True, texts=lambda _: [(text[:1], None)])
        roles.roles = ("negative", "empty")
        both = x[:1].expand(2, -1, -1)
        with torch.no_grad(), attach(model, mixture, prompt_rows=sharing):
            found = call(model, both, text[1:])
            roles.roles = ROLES
            together = call(model, x[:1].expand(3, -1, -1), text)
        assert close(found, together[1:])


def test_a_prompt_keeps_the_gates_of_the_concepts_that_it_names_itself():
    """A negative prompt that names the second LoRA: its own gate for that one, the prompt's for the other."""
    model = Transformer(1)
    x, _ = inputs(model)
    text = torch.zeros(2, 3, FEATURES)
    text[0, 1, 0] = text[1, 2, 1] = 1  # the prompt names the first LoRA, the negative prompt the second
    text[:, 0, 2] = 1
    detector = ConceptDetector(6 * torch.eye(2, FEATURES), torch.full((2,), -7.0), [["ember"], ["heart"]])
    settings = GateSettings(granularity="network")
    mixture = Mixture((lora(model, 1), lora(model, 2)), route_gates(detector, settings, [""]))
    seen = Values()
    with (
        torch.no_grad(),
        attach(model, mixture, prompt_rows=lambda _, batch: range(1)) as attachment,
        attachment.watch(seen),
    ):
        call(model, x, text)
        assert torch.allclose(seen.values[""], torch.tensor([[1.0, 0.0], [1.0, 1.0]]), atol=0.03)
        text[1, 2] = text[1, 0]  # now it names none
        call(model, x, text)
        assert torch.allclose(seen.values[""], torch.tensor([[1.0, 0.0], [1.0, 0.0]]), atol=0.03)
        assert torch.equal(seen.values[""][0], seen.values[""][1])
