"""Negative prompts get the gates of their prompt: in one batch, in two passes, with prompts of several parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.guidance import PromptGateSharing, PromptPassRequired
from torch import Tensor

from ..merge.pools import close
from .mixtures import Values, lora, trained
from .models import Transformer, call, inputs


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
        assert torch.equal(follow("scope", rows(8, 9)), rows(4, 4))
        inside = PromptGateSharing(lambda _, batch: [0], separate_passes=True, texts=prompt_texts)
        inside.begin_pass({}, 2)
        assert inside.prompt_texts({}) == []  # the prompt is in this pass


@pytest.mark.parametrize("reads", ["text", "hidden", "experts"])
@pytest.mark.parametrize("mixing", ["delta", "output"])
def test_both_halves_of_a_guided_batch_use_the_gates_of_the_prompt(reads, mixing):
    model = Transformer(1)
    settings = GateSettings(reads=reads, granularity="block")
    pair = (lora(model, 1), lora(model, 2))
    x, text = inputs(model)  # two samples
    mixture = trained(model, pair, settings, mixing)
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
