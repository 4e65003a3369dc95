"""Record: gate values by pass, scope and expert, and their mean, deviation and entropy."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.mole.attach import attach
from legomole.core.mole.gates import GateSettings
from legomole.core.mole.mixture import Mixture
from legomole.core.mole.record import Record

from .mixtures import lora, trained
from .models import Transformer, inputs
from .regions.models import ByPosition, latent_and_text, left


def record(*passes: dict[str, list[list[float]]], rows=None, sizes=None) -> Record:
    made = Record(rows)
    for i, one in enumerate(passes):
        made.begin_pass({} if sizes is None else sizes[i])
        for scope, value in one.items():
            made.gate_opened(scope, torch.tensor(value))
    return made


def test_by_hand():
    made = record({"a": [[1.0, 0.0], [0.5, 0.5]], "b": [[0.2, 0.8]]}, {"a": [[0.25, 0.75]], "b": [[0.4, 0.6]]})
    assert made.scopes == ["a", "b"]
    # a: mean of its samples (.75, .25), then (.25, .75)
    expected = torch.tensor([[[0.75, 0.25], [0.2, 0.8]], [[0.25, 0.75], [0.4, 0.6]]])
    assert torch.allclose(made.table(), expected)
    assert made.mean()["a"].tolist() == pytest.approx([0.5, 0.5])
    assert made.mean()["b"].tolist() == pytest.approx([0.3, 0.7])
    assert made.spread()["a"].tolist() == pytest.approx([0.25, 0.25])
    assert made.spread()["b"].tolist() == pytest.approx([0.1, 0.1])

    def H(p: float) -> float:
        return -p * math.log(p) - (1 - p) * math.log(1 - p)

    assert made.entropy() == pytest.approx((H(0.75) + H(0.2) + H(0.25) + H(0.4)) / 4)


def test_latest_is_the_last_pass_with_values():
    assert record().latest()[0] == []
    made = record({"a": [[1.0, 0.0]]}, {"a": [[1.0, 0.0], [0.5, 0.5]], "b": [[0.2, 0.8]]}, {})
    scopes, gates = made.latest()
    assert scopes == ["a", "b"]
    assert torch.allclose(gates, torch.tensor([[0.75, 0.25], [0.2, 0.8]]))


def test_the_first_value_of_a_pass_counts():
    """A part of the model that runs again (a tile, a refiner) does not overwrite the recorded value."""
    made = record({"a": [[1.0]]})
    made.gate_opened("a", torch.tensor([[0.0]]))
    assert made.passes == [{"a": torch.tensor([[1.0]])}]


def test_maps_of_regions_are_those_of_the_last_pass(no_gradients: None):
    model, record = ByPosition(), Record()
    x, text = latent_and_text()
    experts = [lora(model, seed, names=["conv_in"]) for seed in (1, 2)]
    for regions, expected in (((), ()), ([left(), None], (left()[None], None))):
        with attach(model, Mixture(experts, regions=regions)) as attachment, attachment.watch(record):
            model(x, encoder_hidden_states=text)
        assert len(record.maps) == len(expected)
        for map_, wanted in zip(record.maps, expected, strict=True):
            assert map_ is wanted or torch.equal(map_, wanted)


def test_rows_of_the_prompt_alone():
    """The caller finds the prompt's rows from the arguments of the model's forward method."""
    made = record(
        {"a": [[0.0], [1.0]]}, {"a": [[0.5]]}, {"a": [[0.2], [0.4]]},
        rows=lambda arguments, batch: [i for i, kind in enumerate(arguments["kinds"]) if kind == "prompt"],
        sizes=[{"kinds": ["negative", "prompt"]}, {"kinds": ["prompt"]}, {"kinds": ["negative", "negative"]}],
    )  # fmt: skip
    assert made.table().flatten().tolist() == [1.0, 0.5]  # the last pass had no row of the prompt


def test_nothing_recorded():
    for made in (Record(), record({})):
        with pytest.raises(MergeError, match=r"No gate values[\s\S]*sample first"):
            made.table()


def test_of_a_running_model():
    model = Transformer()
    x, text = inputs(model)
    mixture = trained(model, (lora(model, 1), lora(model, 2)), GateSettings(reads="text"))
    made = Record()
    with attach(model, mixture) as at, at.watch(made):
        model(x, text)
        model(x, -text)
    assert set(made.scopes) == set(mixture.gates.names)
    for i, sign in enumerate((1, -1)):
        for scope, value in zip(made.scopes, made.table()[i], strict=True):
            assert torch.allclose(
                value, mixture.gates[scope](mixture.gates.detector(sign * text)).mean(0).detach(), atol=1e-6
            )
    assert not made.table().requires_grad
