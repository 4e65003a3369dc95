"""Rules for the weight of single layers: what users may write, and the factors it means for each LoRA."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from legomole.core.adapter import Adapter
from legomole.core.errors import MergeError
from legomole.core.lowrank import LowRank
from legomole.core.merge.engine import merge
from legomole.core.merge.layer_rules import LayerRule, factors_by_pattern, parse_layer_rules, read_layer_rules
from legomole.core.merge.methods.concat import Concat


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("*attn2*=0.5", LayerRule(None, "*attn2*", 0.5)),
        ("  *attn2* = 0.5 ", LayerRule(None, "*attn2*", 0.5)),
        ("2:*attn2*=-1", LayerRule(1, "*attn2*", -1.0)),
        ("1 : unet.x = 1e-3", LayerRule(0, "unet.x", 1e-3)),
        ("*[0-9]*=.5", LayerRule(None, "*[0-9]*", 0.5)),
        ("10*=2", LayerRule(None, "10*", 2.0)),
        ("*=0", LayerRule(None, "*", 0.0)),
    ],
)
def test_one_rule(text: str, rule: LayerRule):
    assert read_layer_rules([text], 2) == [rule]
    assert read_layer_rules(text, 2) == [rule]


def test_a_text_has_a_rule_per_line_with_blank_lines_and_comments():
    text = "# weaker\n\n*attn1* = 0.5  # both\n  \n2: *attn2* = 0 # the second\n"
    assert parse_layer_rules(text, 2) == [{"*attn1*": 0.5}, {"*attn1*": 0.5, "*attn2*": 0.0}]
    assert parse_layer_rules("", 2) == parse_layer_rules([], 2) == [{}, {}]


def test_rules_for_all_and_for_one_multiply():
    """0.5 for both, another 0.5 and 3 for the second: 0.75. The order does not matter."""
    rules = ["*a*=0.5", "2:*a*=0.5", "2:*a*=3"]
    for order in (rules, rules[::-1]):
        assert parse_layer_rules(order, 2) == [{"*a*": 0.5}, {"*a*": 0.75}]


def test_factors_of_rules_for_all_and_for_each_lora():
    rules = read_layer_rules(["*q*=0.5", "2:*q*=3", "*q*=4", "*b*=2", "2:*q*=2", "1:*k*=7"], 2)
    assert list(factors_by_pattern(rules, None).items()) == [("*b*", 2.0), ("*q*", 2.0)]
    assert [factors_by_pattern(rules, i) for i in range(2)] == [{"*k*": 7.0}, {"*q*": 6.0}]


def test_a_rule_for_all_goes_to_the_loras_that_have_such_layers():
    layers = [["unet.a", "unet.b"], ["unet.b", "te.c"], []]
    assert parse_layer_rules(["unet.a=2", "*.b=3", "3:unet.a=5"], 3, layers) == [
        {"unet.a": 2.0, "*.b": 3.0},
        {"*.b": 3.0},
        {"unet.a": 5.0},
    ]


def test_a_rule_that_matches_no_lora_goes_to_all_so_that_the_merge_refuses_it():
    adapters = [Adapter({name: LowRank(torch.ones(1, 2), torch.ones(2, 1))}) for name in ("a", "b")]
    rules = parse_layer_rules("c*=2", 2, [adapter.layers for adapter in adapters])
    assert rules == [{"c*": 2.0}] * 2
    with pytest.raises(MergeError, match=r"matches nothing[\s\S]*c\*"):
        merge(adapters, Concat(), module_weights=rules)


@pytest.mark.parametrize(
    "text", ["", "attn", "=0.5", "2:=0.5", "*a*=", "*a*=x", "*a*=1=2", "a b=1", "*a*=0,5", "1:2:a=b"]
)
def test_what_is_no_rule_is_refused(text: str):
    with pytest.raises(MergeError, match=r"not a rule for layer weights[\s\S]*PATTERN=FACTOR") as caught:
        parse_layer_rules([text], 2)
    assert caught.value.found == text


@pytest.mark.parametrize("text", ["0:*a*=1", "3:*a*=1", "99:*a*=1"])
def test_a_lora_that_does_not_exist_is_refused(text: str):
    with pytest.raises(MergeError, match=r"does not exist[\s\S]*from 1 to 2"):
        parse_layer_rules([text], 2)


@pytest.mark.parametrize("factor", ["nan", "inf", "-inf"])
def test_a_factor_must_be_finite(factor: str):
    with pytest.raises(MergeError, match="not a finite number"):
        parse_layer_rules([f"*a*={factor}"], 1)


@given(st.text())
def test_any_text_is_read_or_refused(text: str):
    try:
        (table,) = parse_layer_rules(text, 1)
    except MergeError:
        return
    assert all(isinstance(factor, float) for factor in table.values())


def test_reading_rules_needs_no_torch():
    code = (
        "import sys; from legomole.core.merge.layer_rules import parse_layer_rules; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
