"""Sweeps: predictions against the engine's own and dense matrices, ranking, cap, ranks, and what cannot be swept."""

from __future__ import annotations

import pytest
import torch
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.merge.account import CHOSEN
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.recipes.method_settings import build_method, takes_statistics
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.run import merge_aligned
from legomole.core.recipes.sweep import CALIBRATED_STRENGTHS, PICTURES, STRENGTHS, Candidate, Sweep, sweep

LAYERS = ("a", "b")


def moment(seed: int, d: int = 12) -> torch.Tensor:
    X = torch.randn(30, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return X.mT @ X / len(X)


def loras(*, spike: float = 1.0, count: int = 2) -> list[Adapter]:
    g = torch.Generator().manual_seed(0)
    adapters: list[Adapter] = []
    for _ in range(count):
        parts = {n: LowRank(torch.randn(3, 12, generator=g), torch.randn(10, 3, generator=g)) for n in LAYERS}
        adapters.append(Adapter(parts))
    first = adapters[0].modules["a"]
    adapters[0].modules["a"].B[:, 0] *= spike
    assert first.rank == 3
    return adapters


def statistics(count: int = 2) -> Statistics:
    own = {i: moment(i + 1) for i in range(count)}
    joint = {(i, j): moment(10 + i + j) for i in range(count) for j in range(i + 1, count)}
    return Statistics({name: ModuleStatistics(own, joint, moment(4)) for name in LAYERS})


def recipe(*weights: float, **fields) -> Recipe:
    return Recipe(method="lego", inputs=[Input(path=f"{i}", weight=w) for i, w in enumerate(weights)], **fields)


def swept(*weights: float, **fields) -> Sweep:
    count = len(weights or (1, 1))
    return sweep(recipe(*(weights or (1.0, 1.0)), **fields), loras(count=count), statistics(count))


def at(found: Sweep, label: str, strength: float) -> Candidate:
    (candidate,) = [c for c in found.candidates if c.label == label and c.strength == strength]
    return candidate


def test_at_the_given_strengths_it_predicts_what_the_merge_reports():
    given = recipe(0.8, -1.1)
    found = sweep(given, loras(), statistics())
    for label in ("concat", "svd 1x", "lego calibrated 1x", "calibrated 1x", "calibrated 2x"):
        candidate = at(found, label, 1.0)
        applied = candidate.apply(given)
        used = {"statistics": statistics()} if takes_statistics(applied.method) else {}
        method = build_method(applied.method, {**applied.settings, **used})
        report = merge_aligned(applied, method, loras(), statistics=statistics()).report
        (row,) = [row for row in report.predicted if row.method == CHOSEN]
        mine = candidate.prediction
        assert mine.alone == pytest.approx(row.alone, rel=1e-4)
        assert (mine.joint, mine.base) == pytest.approx((row.joint, row.base), rel=1e-4)


def test_the_exact_sum_at_other_strengths_by_hand():
    """At 1.2 it is what joint prompts want; at s the base changes s times, and joint errs by ``|s - 1.2| / 1.2``."""
    found = swept()
    for strength in STRENGTHS:
        prediction = at(found, "concat", strength).prediction
        assert prediction.joint == pytest.approx(abs(strength - 1.2) / 1.2, abs=1e-6)
        assert prediction.base == pytest.approx(strength)
    D = [part.delta().double() for part in (adapter.modules["a"] for adapter in loras())]
    E = [part.delta().double() for part in (adapter.modules["b"] for adapter in loras())]
    errors = []
    for first, second in (D, E):
        wrong = 0.7 * (first + second) - first
        errors.append(float((wrong @ moment(1) * wrong).sum() / (first @ moment(1) * first).sum()))
    assert at(found, "concat", 0.7).prediction.alone[0] == pytest.approx((sum(errors) / 2) ** 0.5, rel=1e-4)


def test_candidates_are_sorted_and_the_best_are_of_several_methods():
    found = swept()
    scores = [candidate.score for candidate in found.candidates]
    assert scores == sorted(scores)
    assert len(found.candidates) == 2 * len(STRENGTHS) + 3 * len(CALIBRATED_STRENGTHS)
    best = found.best()
    assert len(best) == PICTURES
    assert best[0] is found.candidates[0]
    assert max([c.label for c in best].count(c.label) for c in best) <= 2
    assert found.best(1) == best[:1]


def test_a_candidate_is_applied_to_a_recipe():
    inputs = [Input(path="a", weight=0.5, text_encoder_weight=2), Input(path="b", weight=-1)]
    given = Recipe(method="lego", inputs=inputs, settings={"geometry": "paper"}, cap=9)
    found = Sweep(("a", "b"), (0.5, -1), 9.0, (Candidate("svd", "2x", 1.2, swept().candidates[0].prediction, 0.1),))
    applied = found.apply(given)
    assert [(e.weight, e.text_encoder_weight) for e in applied.inputs] == [
        (pytest.approx(0.6), pytest.approx(2.4)),
        (pytest.approx(-1.2), None),
    ]
    assert (applied.method, applied.settings, applied.cap) == ("svd", {"rank": "2x"}, 9)


def test_a_spike_caps_all_candidates():
    given = recipe(1.0, 1.0)
    found = sweep(given, loras(spike=500), statistics())
    assert found.cap == 8
    assert found.reasons[0].startswith("cap 8: ")
    assert found.apply(given).cap == 8
    capped = merge_aligned(given.model_copy(update={"cap": 8}), build_method("concat", {}), loras(spike=500))
    assert max(module.norms[0] for module in capped.report.modules) < 100
    assert swept(cap=20.0).cap == 20
    assert swept().cap is None


@pytest.mark.parametrize(
    ("rank", "ranks"),
    [("1x", {"", "1x", "2x"}), (2, {"", "2", "4"}), (5, {"", "5", "6"}), ("90%", {"", "90%"}), ("2x", {"", "2x"})],
)
def test_ranks_follow_the_recipe(rank: str | int, ranks: set[str]):
    found = swept(settings={"rank": rank})
    assert {candidate.rank for candidate in found.candidates} == ranks
    labels = [(c.label, c.strength) for c in found.candidates]
    assert len(labels) == len(set(labels))


def test_normalised_weights_have_one_strength():
    assert {candidate.strength for candidate in swept(normalize=True).candidates} == {1.0}


def test_one_lora_and_three():
    one = swept(1.0)
    assert at(one, "concat", 1.0).prediction.alone == (pytest.approx(0, abs=1e-6),)
    assert one.candidates[0].prediction.joint is None
    assert len(swept(1.0, 1.0, 1.0).candidates[0].prediction.alone) == 3


def test_statistics_of_other_layers_are_refused():
    other = Statistics({"c": ModuleStatistics({0: moment(1)})})
    with pytest.raises(MergeError, match="none of the layers"):
        sweep(recipe(1.0, 1.0), loras(), other)


def test_it_can_be_cancelled():
    def cancel(done: int, total: int, name: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sweep(recipe(1.0, 1.0), loras(), statistics(), progress=cancel)


def test_the_table():
    found = swept(0.5, 2.0)
    head, *rows = found.rows()
    assert head[:3] == ("merge", "strength", "predicted")
    assert head[-2:] == ("joint", "base")
    assert len(rows) == len(found.candidates)
    text = found.text()
    assert "weight 0.5" in text
    assert all(len(row) == len(head) for row in rows)
    assert found.to_dict()["candidates"][0]["prediction"]["base"] == found.candidates[0].prediction.base
