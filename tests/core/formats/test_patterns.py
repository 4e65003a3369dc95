"""Patterns of PEFT configurations: as PEFT reads them, and never without end."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from legomole.core.errors import FormatError
from legomole.core.formats.patterns import Patterns

NAMES = [
    "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj", "model.layers.11.mlp.up_proj", "q_proj",
    "model.q_proj", "x.model-a.b", "xq_proj", "layers.1", "model.layersX1", "a.b.c.", "",
]  # fmt: skip
KEYS = [
    "q_proj", "layers.1.self_attn.q_proj", "^q_proj", r"^model\.q_proj", "^model.q_proj",
    r"layers\.1\.self_attn\.q_proj",
    ".*q_proj", "self_attn.*", r"model\.layers\.(0|11)\..*", "[qk]_proj", r"layers\.\d+\.mlp\.up_proj", "model-a.b",
    re.escape("x.model-a.b"), "layers.1", "", "layers.1$", "q_proj$", "(?:q|up)_proj", ".q_proj", r"\w+",
]  # fmt: skip


def of_peft(table: dict[str, int], module: str) -> int | None:
    """What PEFT's ``get_pattern_key`` does."""
    key = next((key for key in table if re.match(rf"(.*\.)?({key})$", module)), None)
    return None if key is None else table[key]


@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
def test_the_first_match_counts_as_in_peft(keys: list[str]) -> None:
    table = {key: i for i, key in enumerate(keys)}
    patterns = Patterns(table)
    assert [patterns.get(name, None) for name in NAMES] == [of_peft(table, name) for name in NAMES]


@given(st.text("ab.^\\_", max_size=8), st.text("ab._", max_size=10))
def test_names_are_looked_up_as_expressions_would_match(key: str, module: str) -> None:
    try:
        expected = of_peft({key: 1}, module)
    except re.error:
        with pytest.raises(FormatError):
            Patterns({key: 1})
        return
    assert Patterns({key: 1}).get(module, None) == expected


@pytest.mark.parametrize(
    "key", ["(a+)+b", "(a|aa)+$", "(a*)*", r"(.*)\1x", ".*.*.*.*.*.*x", "a?" * 30 + "a" * 30, "(?=a)a", "(?P<n>a){9}",
            "(a|a)(a|a)(a|a)(a|a)(a|a)(a|a)", "x" * 3000 + "*"]
)  # fmt: skip
def test_expressions_without_an_end_are_refused(key: str) -> None:
    with pytest.raises(FormatError, match=r"too involved[\s\S]*name the layers"):
        Patterns({key: 8})


def test_the_work_is_limited() -> None:
    """Expressions that are simple, but many, for names that make each of them slow."""
    patterns = Patterns({f".*a.*a.*{i}": i for i in range(100)})
    with pytest.raises(FormatError, match=r"too long[\s\S]*100 regular expressions"):
        [patterns.get(f"{'a' * 500}{i}", 0) for i in range(1000)]


def test_no_regular_expression() -> None:
    with pytest.raises(FormatError, match="not a regular expression"):
        Patterns({"(": 4})


def test_thousands_of_layers_with_patterns_of_their_own() -> None:
    """A merge at a share of energy writes a pattern for nearly every layer: looking up must not try each for each."""
    names = [f"model.layers.{i}.block.{j}.experts.{k}.up_proj" for i in range(30) for j in range(4) for k in range(20)]
    began = time.process_time()
    patterns = Patterns({f"^{re.escape(name)}": i for i, name in enumerate(names)})
    assert [patterns.get(name, None) for name in names] == list(range(len(names)))
    plain = Patterns({name: i for i, name in enumerate(names)})
    assert [plain.get(name, None) for name in names] == list(range(len(names)))
    assert time.process_time() - began < 60  # as expressions, one by one: many minutes
