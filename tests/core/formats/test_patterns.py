"""Patterns of PEFT configurations match as in PEFT, and in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from legomole.core.errors import FormatError
from legomole.core.formats.patterns import PatternTable

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
    """The lookup of PEFT's ``get_pattern_key``."""
    key = next((key for key in table if re.match(rf"(.*\.)?({key})$", module)), None)
    return None if key is None else table[key]


@given(st.lists(st.sampled_from(KEYS), unique=True, max_size=5))
def test_the_first_match_counts_as_in_peft(keys: list[str]) -> None:
    table = {key: i for i, key in enumerate(keys)}
    patterns = PatternTable(table)
    assert [patterns.get(name, None) for name in NAMES] == [of_peft(table, name) for name in NAMES]


@given(st.text("ab.^\\_ ,", max_size=8), st.text("ab._^ ,", max_size=10))
def test_names_are_looked_up_as_expressions_would_match(key: str, module: str) -> None:
    try:
        expected = of_peft({key: 1}, module)
    except re.error:
        with pytest.raises(FormatError):
            PatternTable({key: 1})
        return
    assert PatternTable({key: 1}).get(module, None) == expected


@pytest.fixture
def half_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("legomole.core.formats.patterns._MAX_SECONDS", 0.5)


@pytest.mark.usefixtures("half_a_second")
@pytest.mark.parametrize(
    "key", [r"(?:\w+\.?)+[^\w.]", r"(.*)\1[bc]", ".*.*.*.*.*[bc]", "(?:a?){1000}[bc]", "(a|b|ab)*[cd]", r"\1{999}()"]
)
def test_slow_expressions_are_refused(key: str) -> None:
    """Each takes hours for one of these names."""
    patterns = PatternTable({key: 8})
    began = time.thread_time()
    with pytest.raises(FormatError, match=r"takes too long[\s\S]*1 regular expressions[\s\S]*name the layers"):
        [patterns.get(name, None) for name in ("a" * 3000, "a." * 100_000)]
    assert time.thread_time() - began < 5


@pytest.mark.parametrize(
    "key", ["(a{1000}){1000}", "((((a{1000}){1000}){1000}){1000})", "(a{0}){0}(a{999999999})", "(?x:a{ 9 9 9 9 9 9 })",
            "(?:a{e<=3}){5}", "x" * 200_000 + "*", "a{" + "9" * 5000 + "}"]
)  # fmt: skip
def test_expressions_that_would_fill_the_memory_are_refused(key: str) -> None:
    with pytest.raises(FormatError, match=r"too large or too unusual[\s\S]*name the layers"):
        PatternTable({key: 8})


def test_many_large_expressions_are_refused() -> None:
    with pytest.raises(FormatError, match="too large"):
        PatternTable({f"{'x' * 2000}*{i}": i for i in range(100)})


@pytest.mark.usefixtures("half_a_second")
def test_the_time_of_all_lookups_is_limited() -> None:
    """Expressions that are fast, but many, for many modules."""
    patterns = PatternTable({f".*a.*a.*{i}": i for i in range(100)})
    with pytest.raises(FormatError, match=r"too long[\s\S]*100 regular expressions among 100 keys"):
        [patterns.get(f"{'a' * 500}{i}b", 0) for i in range(100_000)]


def test_a_long_name_of_a_module() -> None:
    name = "a." * 500_000
    patterns = PatternTable({"b": 1, "x.a": 2, f"{name[:900]}q": 3})
    began = time.thread_time()
    assert [patterns.get(f"{name}{end}", 0) for end in ("b", "c", "x.a", "q")] == [1, 0, 2, 3]
    assert time.thread_time() - began < 20


@pytest.mark.parametrize("key", ["(", "[", r"a\q", "a**", "(?R)", r"\p", "(?P<n>a)(?P<n>b)", "(" * 5000])
def test_no_regular_expression(key: str) -> None:
    """Keys that `re`, which PEFT uses, refuses."""
    with pytest.raises(FormatError, match="not a regular expression"):
        PatternTable({key: 4})


def test_thousands_of_layers_with_patterns_of_their_own() -> None:
    """A merge by energy writes a pattern for nearly every layer: a lookup must not try all of them."""
    names = [f"model.layers.{i}.block.{j}.experts.{k}.up_proj" for i in range(30) for j in range(4) for k in range(20)]
    began = time.process_time()
    patterns = PatternTable({f"^{re.escape(name)}": i for i, name in enumerate(names)})
    assert [patterns.get(name, None) for name in names] == list(range(len(names)))
    plain = PatternTable({name: i for i, name in enumerate(names)})
    assert [plain.get(name, None) for name in names] == list(range(len(names)))
    assert time.process_time() - began < 60  # as expressions, one by one: many minutes
