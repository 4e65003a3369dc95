"""Suggested strengths and settings: by hand, as inner products of the suggested sum, and applied to recipes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from legomole.core.adapter import Adapter, Source
from legomole.core.lowrank import LowRank, concat
from legomole.core.merge.statistics import ModuleStatistics, Statistics
from legomole.core.recipes.recipe import Input, Recipe
from legomole.core.recipes.suggest import Suggestion, suggest

from ..merge.findings.hand_made import WIDTH, adapter, part


def recipe(count: int, *weights: float, **fields) -> Recipe:
    given = weights or (1.0,) * count
    return Recipe(method="lego", inputs=[Input(path=f"{i}", weight=w) for i, w in enumerate(given)], **fields)


def suggested(*adapters: Adapter, weights: tuple[float, ...] = (), loudness="each", **fields) -> Suggestion:
    return suggest(recipe(len(adapters), *weights, **fields), adapters, loudness)


def random_part(seed: int, rank: int = 4, width: int = 40) -> LowRank:
    g = torch.Generator().manual_seed(seed)
    return LowRank(torch.randn(rank, width, generator=g), torch.randn(width, rank, generator=g))


def test_loras_that_do_not_overlap_keep_their_strengths():
    found = suggested(adapter("a", part(2)), adapter("b", part(1, first=4)), weights=(0.8, 1.2))
    assert found.weights == (0.8, 1.2)


def test_one_lora_twice_is_divided():
    assert suggested(*(adapter(name, random_part(0)) for name in "ab")).weights == (0.5, 0.5)


def test_a_contained_lora_counts_once():
    first, second = random_part(1), random_part(2)
    found = suggested(adapter("part", first), adapter("whole", concat([first, second], [1.0, 1.0])))
    assert found.weights == pytest.approx((0, 1), abs=0.005)


@settings(max_examples=20, deadline=None)
@given(st.floats(-0.6, 0.8), st.floats(0.5, 2), st.floats(0.7, 1.5))
def test_every_lora_acts_in_the_sum_as_it_does_alone(cosine: float, size: float, weight: float):
    """``<sum, delta_i> = |delta_i|^2`` at the given weights, unless a strength would have to be above 1.5."""
    sine = (1 - cosine**2) ** 0.5
    a = torch.tensor([[1.0, 0.0]])
    b = size * torch.tensor([[cosine, sine]])
    adapters = [adapter(name, LowRank(x, torch.ones(1, 1))) for name, x in (("a", a), ("b", b))]
    found = suggested(*adapters, weights=(1, weight))
    total = found.weights[0] * a + found.weights[1] * b
    factors = (found.weights[0], found.weights[1] / weight)
    if max(factors) < 1.49 and min(factors) > 0.03:
        assert float(total @ a.T) == pytest.approx(1, rel=0.02)
        assert float(total @ (weight * b).T) == pytest.approx((weight * size) ** 2, rel=0.02)


def test_as_loud_as_the_loudest():
    """Norms 3 and 4 at a right angle: 5, so 0.8 times; with weights 1 and 0.75 (3 and 3) it is 0.707."""
    pair = adapter("a", part(3)), adapter("b", part(4, first=4))
    assert suggested(*pair, loudness="loudest").weights == (0.8, 0.8)
    found = suggested(*pair, weights=(1, 0.75), loudness="loudest")
    assert found.weights == pytest.approx((0.707, 0.53), rel=1e-3)
    assert "1.41 times as loud as the loudest LoRA" in found.reasons[0]


def test_loras_that_cancel_are_not_amplified_without_limit():
    found = suggested(adapter("a", part(1)), adapter("b", part(-0.99)), loudness="loudest")
    assert found.weights == (1.5, 1.5)


def test_text_encoder_weights_get_the_same_factor():
    inputs = [Input(path="a", weight=1, text_encoder_weight=0.5), Input(path="b")]
    loras = [adapter(name, random_part(0)) for name in "ab"]
    found = suggest(Recipe(method="lego", inputs=inputs), loras)
    assert found.weights[0] == pytest.approx(0.5, abs=0.05)
    assert found.text_encoder_weights == (pytest.approx(found.weights[0] / 2, abs=0.005), None)


def test_a_spike_suggests_a_cap_and_is_not_heard():
    """The spike shares a direction with b. Capped at 8, a is 8, 1, 1 and 2, 1, 1 in three layers."""
    sound = part(2, 1, 1)
    spiked = adapter("a", part(500, 1, 1), sound, sound, sound)
    found = suggested(spiked, adapter("b", part(3, first=8), part(4, first=8), part(1, first=8), part(1, first=8)))
    assert found.cap == 8
    assert found.reasons[0].startswith("cap 8: a has a spectral spike")
    assert found.equalize == 0
    assert suggested(spiked, cap=5.0).cap == 5


def test_far_apart_suggests_equalize():
    pair = adapter("a", part(10)), adapter("b", part(1, first=4))
    assert suggested(*pair).equalize == 0.5
    assert suggested(*pair, equalize=0.1).equalize == 0.1
    assert suggested(adapter("a", part(3)), pair[1]).equalize == 0


def test_methods_and_ranks():
    pair = adapter("a", random_part(1)), adapter("b", random_part(2))
    assert (suggested(*pair).method, suggested(*pair).rank) == ("concat", None)
    large = [adapter(name, random_part(i, 40, 100)) for i, name in enumerate("cd")]
    fast = replace(large[1], source=Source("lcm-lora.safetensors"))
    assert (suggested(*large).method, suggested(*large).rank) == ("svd", "95%")
    found = suggested(large[0], fast)
    assert found.method == "concat"
    assert "speed-up" in found.reasons[-1]
    twice = suggested(large[0], adapter("e", random_part(0, 40, 100)))
    assert (twice.method, twice.rank) == ("svd", "95%")
    own, other = large[0].modules["blocks.0.attn.q"], random_part(9, 40, 100)
    against = adapter("f", concat([own, other], [-1.0, 1.0]))
    assert suggested(large[0], against).method == "ties"


def test_a_suggestion_is_applied_to_a_recipe():
    suggestion = Suggestion((0.5, 2.0), (None, 1.0), "svd", "95%", 8.0, 0.5, ("because",))
    changed = suggestion.apply(recipe(2).model_copy(update={"settings": {"geometry": "paper"}}))
    assert (changed.method, changed.settings, changed.cap, changed.equalize) == ("svd", {"rank": "95%"}, 8, 0.5)
    assert [(entry.weight, entry.text_encoder_weight) for entry in changed.inputs] == [(0.5, None), (2, 1)]
    kept = replace(suggestion, method="lego", rank=None).apply(
        recipe(2).model_copy(update={"settings": {"geometry": "paper"}})
    )
    assert kept.settings == {"geometry": "paper"}
    assert suggestion.text(["a", "b"]) == "suggested: a 0.5, b 2\n  because"


def test_method_and_rank_may_stay():
    pair = adapter("a", random_part(1)), adapter("b", random_part(2))
    found = suggest(recipe(2), pair, choose_method=False)
    assert (found.method, found.rank, len(found.reasons)) == ("lego", None, 1)


def measured(*kinds: tuple[int, ...], own: dict[tuple[int, ...], torch.Tensor] | None = None) -> Statistics:
    """Statistics of the first layer; inputs of every kind have equal size in all directions unless `own` says so."""
    C = {kind: (own or {}).get(kind, torch.eye(WIDTH, dtype=torch.float64)) for kind in kinds}
    single = {kind[0]: matrix for kind, matrix in C.items() if len(kind) == 1}
    joint = {kind: matrix for kind, matrix in C.items() if len(kind) > 1}
    return Statistics({"blocks.0.attn.q": ModuleStatistics(single, joint, C[()])})


def on_inputs(adapters, statistics: Statistics, *weights: float, method: str = "concat", **options) -> Suggestion:
    given = recipe(len(adapters), *weights).model_copy(update={"method": method})
    return suggest(given, adapters, statistics=statistics, choose_method=False, **options)


def test_two_loras_act_together_at_the_strength_that_joint_prompts_want():
    pair = adapter("a", part(2)), adapter("b", part(1, first=4))
    found = on_inputs(pair, measured((), (0,), (1,), (0, 1)), 0.5, 1.0)
    assert found.weights == pytest.approx((0.6, 1.2))
    assert "0% away from what they want, with the given strengths 17%" in found.reasons[-1]


def test_what_two_loras_have_in_common_counts_once_there_too():
    twice = [adapter(name, random_part(0, width=WIDTH)) for name in "ab"]
    assert on_inputs(twice, measured((), (0,), (1,), (0, 1))).weights == pytest.approx((0.6, 0.6))


def test_a_third_lora_that_joint_prompts_do_not_name_lowers_the_strengths():
    """Three equal orthogonal LoRAs, prompts for each two: ``2 (s - 1.2)^2 + s^2``, least at 0.8."""
    three = [adapter(name, part(1, first=4 * i)) for i, name in enumerate("abc")]
    found = on_inputs(three, measured((), (0, 1), (0, 2), (1, 2)))
    assert found.weights == pytest.approx((0.8, 0.8, 0.8))


def test_without_joint_prompts_those_for_one_lora_count():
    """Prompts for a use the directions of b twice as much: b is turned down, ``(s - 1)^2`` and ``s^2 4``."""
    pair = adapter("a", part(1)), adapter("b", part(1, first=4))
    wide = torch.eye(WIDTH, dtype=torch.float64)
    wide[4:] *= 4
    found = on_inputs(pair, measured((), (0,), (1,), own={(0,): wide}))
    assert found.weights == pytest.approx((0.5, 0.2))
    assert "prompts for one LoRA" in found.reasons[-1]


def test_a_calibrated_merge_and_the_loudest_keep_the_strengths_of_norms():
    pair = adapter("a", part(2)), adapter("b", part(1, first=4))
    statistics = measured((), (0,), (1,), (0, 1))
    assert on_inputs(pair, statistics, method="calibrated").weights == (1, 1)
    assert on_inputs(pair, statistics, loudness="loudest").weights == pytest.approx((0.894, 0.894), abs=0.001)


def test_prompts_that_name_no_lora_of_the_merge_change_nothing():
    found = on_inputs([adapter("a", part(2))], measured(()))
    assert found.weights == (1,)
    assert "name no LoRA" in found.reasons[-1]
