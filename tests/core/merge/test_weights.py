"""Weights of adapters, of their text encoders and of single modules."""

from __future__ import annotations

import math

import pytest
import torch
from legomole.core.errors import MergeError
from legomole.core.merge.engine import merge
from legomole.core.merge.methods.concat import Concat
from legomole.core.merge.weights import adapters_matching

from .adapters import named, part


def test_all_weights_zero_is_an_error(pair):
    with pytest.raises(MergeError, match="every weight is 0"):
        merge(pair, Concat(), [0, 0])


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_no_number_names_the_file(pair, weight):
    with pytest.raises(MergeError, match="not a finite number") as caught:
        merge(pair, Concat(), [1.0, weight])
    assert caught.value.file == "loras/subject.safetensors"


def test_weights_must_fit_the_adapters(pair):
    with pytest.raises(MergeError, match="one weight") as caught:
        merge(pair, Concat(), [1.0])
    assert (caught.value.expected, caught.value.found) == (2, 1)


def test_normalize_divides_by_the_sum_of_magnitudes(pair):
    """Weights 3 and -1: magnitudes add up to 4, so 0.75 and -0.25."""
    result = merge(pair, Concat(), [3, -1], normalize=True)
    assert result.report.weights == (0.75, -0.25)
    want = 0.75 * pair[0].modules["both"].delta() - 0.25 * pair[1].modules["both"].delta()
    torch.testing.assert_close(result.adapter.modules["both"].delta(), want)


def test_text_encoder_weight_reaches_text_encoders_only():
    adapter = named("a", {"lora_te1_q": part(1, seed=1), "text_encoder.q": part(1, seed=2), "lora_unet_q": part(1)})
    modules = merge([adapter], Concat(), [2.0], text_encoder_weights=[0.5]).adapter.modules
    for name, weight in {"lora_te1_q": 0.5, "text_encoder.q": 0.5, "lora_unet_q": 2.0}.items():
        torch.testing.assert_close(modules[name].delta(), weight * adapter.modules[name].delta())


def test_text_encoder_weight_of_its_own_is_noted():
    """Weight 0 on the diffusion model only: not left out."""
    a = named("a", {"lora_te1_q": part(1), "lora_unet_q": part(1)})
    b = named("b", {"lora_unet_q": part(1)})
    report = merge([a, b], Concat(), [0, 1], text_encoder_weights=[0.5, 0]).report
    assert report.notes == (
        "1 modules of a have weight 0 and were left out: lora_unet_q",
        "a has weight 0.5 in the text encoders",
    )


def test_module_patterns_multiply(pair):
    """`*both*` matches both 0.5 and 0.25: 0.125 times the weight 2 is 0.25. The other adapter is untouched."""
    patterns = [{"*both*": 0.5, "bo?h": 0.25}, {}]
    result = merge(pair, Concat(), [2.0, 1.0], module_weights=patterns)
    want = 0.25 * pair[0].modules["both"].delta() + pair[1].modules["both"].delta()
    torch.testing.assert_close(result.adapter.modules["both"].delta(), want)


def test_module_factor_zero_keeps_an_adapter_out_of_a_module(pair):
    result = merge(pair, Concat(), module_weights=[{"*": 0}, {}])
    assert set(result.adapter.modules) == {"both", "only_subject"}
    assert result.adapter.modules["both"].rank == 2


def test_modules_left_out_by_a_factor_are_named(pair):
    result = merge(pair, Concat(), module_weights=[{}, {"only_subject": 0}])
    assert "only_subject" not in result.adapter.modules
    assert result.report.notes == ("1 modules of subject have weight 0 and were left out: only_subject",)


def test_a_pattern_that_matches_nothing_is_an_error(pair):
    with pytest.raises(MergeError, match="matches nothing") as caught:
        merge(pair, Concat(), module_weights=[{}, {"*attn9*": 0.5}])
    assert caught.value.found == "*attn9*"
    assert caught.value.file == "loras/subject.safetensors"
    assert "both, only_subject" in caught.value.expected


def test_a_module_factor_must_be_finite(pair):
    with pytest.raises(MergeError, match="module weight") as caught:
        merge(pair, Concat(), module_weights=[{"*": math.nan}, {}])
    assert caught.value.module == "*"


def test_tables_of_module_weights_must_fit_the_adapters(pair):
    with pytest.raises(MergeError, match="one table of module weights") as caught:
        merge(pair, Concat(), module_weights=[{}])
    assert (caught.value.expected, caught.value.found) == (2, 1)


def test_adapters_matching_a_pattern_have_such_layers(pair):
    """Layers with a diff alone count too."""
    norm = named("norm", {}, diffs={"only_norm.weight": torch.ones(3)})
    assert adapters_matching("*both*", pair) == [0, 1]
    assert adapters_matching("only_*", [*pair, norm]) == [0, 1, 2]
    assert adapters_matching("only_norm", [*pair, norm]) == [2]
    assert adapters_matching("*attn9*", pair) == []
