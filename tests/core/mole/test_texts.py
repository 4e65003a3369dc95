"""Positions of texts that gates read, by hand; prompts and padding on a small causal model."""

from __future__ import annotations

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.texts import TextPositions
from torch import Tensor

from ..merge.pools import close
from .mixtures import Values, lora, trained
from .models import Transformer, inputs

X = torch.tensor([[[1.0, 2.0], [3.0, 4.0], [50.0, 60.0]], [[7.0, 8.0], [9.0, 10.0], [11.0, 12.0]]])
OWN = torch.tensor([[True, True, False], [False, True, True]])


class TestReading:
    def test_the_mean_over_own_positions(self):
        assert TextPositions(OWN).mean(X).tolist() == [[2.0, 3.0], [10.0, 11.0]]
        assert TextPositions().mean(X).tolist() == [[18.0, 22.0], [9.0, 10.0]]

    def test_positions_after_the_last_do_not_count(self):
        assert TextPositions(OWN[:, :2]).mean(X).tolist() == [[2.0, 3.0], [9.0, 10.0]]

    def test_a_text_without_positions_reads_nothing(self):
        assert TextPositions(torch.zeros(2, 3, dtype=torch.bool)).mean(X).tolist() == [[0.0, 0.0], [0.0, 0.0]]

    def test_input_without_positions_is_unchanged(self):
        assert torch.equal(TextPositions(OWN).mean(X[:, 0]), X[:, 0])
        assert torch.equal(TextPositions().mean(X[:, 0]), X[:, 0])

    def test_rows_are_the_own_positions(self):
        assert TextPositions(OWN).rows(X).tolist() == [[1.0, 2.0], [3.0, 4.0], [9.0, 10.0], [11.0, 12.0]]
        assert TextPositions().rows(X).shape == (6, 2)

    def test_tokens_in_a_row_get_their_positions_back(self):
        assert torch.equal(TextPositions(OWN).by_position(X.flatten(0, 1)), X)
        assert TextPositions().by_position(X.flatten(0, 1)).shape == (1, 6, 2)
        assert TextPositions(OWN).by_position(X) is X

    def test_a_prompt_is_part_of_the_own_positions(self):
        prompt = torch.tensor([[True, False], [True, True]])
        assert TextPositions(OWN).only(prompt).mask.tolist() == [[True, False], [False, True]]
        assert TextPositions().only(prompt).mask is prompt

    @pytest.mark.parametrize("x", [X[:1], X[:, :2], X.flatten(0, 1), X[None]])
    def test_inputs_that_are_not_texts(self, x: Tensor):
        with pytest.raises(MergeError, match=r"position by position[\s\S]*\(2, 3\)[\s\S]*granularity network"):
            TextPositions(OWN).mean(x)


@pytest.mark.parametrize("reads", ["hidden", "experts"])
@pytest.mark.parametrize(("granularity", "mixing"), [("layer", "delta"), ("network", "delta"), ("block", "output")])
@torch.no_grad()
def test_gates_read_the_prompt_alone(reads, granularity, mixing):
    """On a model without attention, a prompt among other tokens opens the same gates as alone."""
    model = Transformer(1)
    model.blocks[0].attn = torch.nn.Sequential(torch.nn.Linear(8, 8)).requires_grad_(False)
    settings = GateSettings(reads=reads, granularity=granularity)
    mixture = trained_without_text(model, settings, mixing)
    x, _ = inputs(model)
    prompt = torch.tensor([[False, True, True, False], [True, False, False, False]])
    whole, alone = Values(), [Values(), Values()]
    with attach(model, mixture) as at:
        with at.watch(whole), at.prompt(prompt):
            model(x)
        for i, part in enumerate((x[:1, 1:3], x[1:, :1])):
            with at.watch(alone[i]):
                model(part)
        with at.watch(after := Values()):
            model(x)
    assert whole.values
    for scope, value in whole.values.items():
        assert close(value, torch.cat([values.values[scope] for values in alone]))
        assert not close(value, after.values[scope], 1e-2)


def trained_without_text(model, settings, mixing="delta") -> Mixture:
    return trained(model, (lora(model, 1, names=names(model)), lora(model, 2, 3, names=names(model))), settings, mixing)


def names(model) -> list[str]:
    """All layers except the one that reads the text."""
    return [n for n, layer in model.named_modules() if isinstance(layer, torch.nn.Linear) and n != "ctx"]
