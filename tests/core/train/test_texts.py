"""Training on texts: the loss by hand, and errors."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSet, GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.train import FitSettings, Text, train_on_texts
from legomole.core.train.texts import NextToken, answer_logits
from torch import Tensor, nn

from ..mole.mixtures import lora
from ..mole.models import Block, D, seeded


def text(*ids: int, start: int = 1, expert: int | None = 0) -> Text:
    return Text(torch.tensor(ids), start, expert)


class TestNextToken:
    # a model that gives the same logits everywhere: (log 1, log 2, log 5): probabilities 1/8, 2/8, 5/8
    @staticmethod
    def constant(texts):
        longest = max(len(t.ids) for t in texts)
        return torch.tensor([1.0, 2.0, 5.0]).log().expand(len(texts), longest, 3)

    def test_the_language_models_loss_by_hand(self):
        texts = [text(0, 2, 1), text(1, 0), text(1, 0, 2, 2, start=2)]
        objective = NextToken(self.constant, texts, [None] * 3)
        assert objective.size == 3
        # tokens 2 and 1 after the first: -(log 5/8 + log 2/8) / 2; then token 0: -log 1/8; then 2, 2 after a prompt
        first, second, third = -(math.log(5 / 8) + math.log(2 / 8)) / 2, math.log(8), -math.log(5 / 8)
        assert float(objective.loss([0])) == pytest.approx(first)
        assert float(objective.loss([2, 0])) == pytest.approx((first + third) / 2)
        assert float(objective.loss([0, 1, 2])) == pytest.approx((first + second + third) / 3)

    def test_divergence_from_the_base_model_by_hand(self):
        # found (1/4, 3/4), base (1/2, 1/2) at both tokens: KL(base, found) = (log 2 + log 2/3) / 2
        found = torch.tensor([1.0, 3.0]).log()
        given = [text(0, 1, expert=None), text(0, 1)]
        objective = NextToken(lambda texts: found.expand(len(texts), 2, 2), given, [torch.zeros(2, 2), None])
        near, learnt = (math.log(2) + math.log(2 / 3)) / 2, math.log(4 / 3)
        assert float(objective.loss([0])) == pytest.approx(near)
        assert float(objective.loss([0, 1])) == pytest.approx((near + learnt) / 2)
        same = NextToken(lambda texts: torch.zeros(1, 2, 2), given, [torch.zeros(2, 2), None])
        assert float(same.loss([0])) == pytest.approx(0, abs=1e-7)

    def test_answers_are_cut_out_of_padded_rows(self):
        logits = torch.arange(2 * 4 * 3.0).view(2, 4, 3)
        one, two = answer_logits(lambda _: logits, [text(0, 1, 2, 0, start=3), text(1, 2, start=1)])
        assert torch.equal(one, logits[0, 2:4])
        assert torch.equal(two, logits[1, :2])


class Language(nn.Module):
    """Tokens ``(B, T)`` to logits over 6 words, each position on its own."""

    def __init__(self) -> None:
        super().__init__()
        with seeded(0):
            self.embed, self.blocks, self.head = nn.Embedding(6, D), nn.ModuleList([Block(D)]), nn.Linear(D, 6)
        self.blocks[0].attn = nn.Sequential(nn.Linear(D, D))
        self.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.embed(ids)))


def prepared(reads: str = "token", activation: str = "sigmoid"):
    model = Language()
    names = ["blocks.0.attn.0", "blocks.0.ff.0"]
    experts = lora(model, 1, names=names, size=1.0), lora(model, 2, names=names, size=1.0)
    return model, Mixture(experts, GateSet(2, GateSettings(reads=reads, activation=activation)))


def train(model: nn.Module, mixture: Mixture, texts: list[Text], **kw):
    settings = FitSettings(steps=30, batch=3, warmup=0, learning_rate=0.05)

    def logits(some):
        return model(nn.utils.rnn.pad_sequence([t.ids for t in some], batch_first=True))

    with attach(model, mixture) as attachment:
        return train_on_texts(attachment, mixture, texts, logits, settings, **kw)


def test_the_record_counts_the_texts():
    model, mixture = prepared()
    texts = [text(0, 1, 2), text(0, 2, expert=1), text(3, 3, expert=1), text(4, 4, 5, expert=None)]
    done = train(model, mixture, texts, base="Language")
    assert done.gates.training["texts"] == [1, 2, 1]
    assert done.gates.training["settings"]["objective"] == "next-token"
    assert done.gates.base == "Language"
    assert len(done.fit.losses) == 30
    assert sum(done.fit.losses[-5:]) < sum(done.fit.losses[:5])
    assert all(p.grad is None for p in model.parameters())


def test_texts_without_a_lora_preserve_the_base_model():
    """Gates close on texts for which the base model is to be preserved."""
    model, mixture = prepared()
    ids = torch.tensor([4, 5, 4, 5])
    texts = [text(0, 1), text(0, 1, expert=1), *(Text(ids, 1, None) for _ in range(6))]
    done = train(model, mixture, texts)
    before = model(ids[None])
    away = []
    for gates in (mixture.gates, done.gates.gates):
        with attach(model, Mixture(mixture.experts, gates)):
            away.append(float((model(ids[None]) - before).detach().square().mean()))
    assert away[1] < 0.5 * away[0]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([text(0, 1)], r"no texts to learn from"),
        ([text(0, 1), text(0, 1, start=2, expert=1)], r"nothing to predict[\s\S]*found: +2 and 0 tokens"),
        ([text(0, 1), text(0, 1, start=0, expert=1)], r"at least one token"),
    ],
)
def test_texts_without_anything_to_learn(texts, message):
    with pytest.raises(MergeError, match=message):
        train(*prepared(), texts)


def test_a_softmax_over_one_lora_is_not_trained():
    model, mixture = prepared(activation="softmax")
    with pytest.raises(MergeError, match="always 1"):
        train(model, mixture.only([0]), [text(0, 1)])
