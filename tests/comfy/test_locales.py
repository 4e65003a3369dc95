"""The translations that ComfyUI serves to its page, compared with the schemas of the loaded nodes."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import pytest

from .server import Server

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def schemas(comfy: Server) -> dict[str, Any]:
    """Node id -> the server's description of a node of ours."""
    return {name: node for name, node in comfy.get("/object_info").items() if name.startswith("LegoMoLE_")}


@pytest.fixture(scope="module")
def served(comfy: Server) -> dict[str, Any]:
    """Language -> its texts."""
    return comfy.get("/i18n")


def inputs_of(inputs: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every input with its options, under the page's key for its texts: its name with ``_`` for each dot.

    A dynamic combo's nested inputs are the widgets ``method.rank`` .. of the page. The sockets of a growing row have
    no texts of their own: their labels are ``lora0``, ``lora1`` .. in every language.
    """
    for name, (kind, options) in {**inputs.get("required", {}), **inputs.get("optional", {})}.items():
        yield f"{prefix}{name}".replace(".", "_"), options
        if kind == "COMFY_DYNAMICCOMBO_V3":
            for option in options["options"]:
                yield from inputs_of(option["inputs"], f"{prefix}{name}.")


def wanted(node: dict[str, Any]) -> set[str]:
    """Return the texts of a schema as paths. An output named like its type needs no name: the page translates types."""
    paths = {"display_name", "description"}
    for key, options in inputs_of(node["input"]):
        paths |= {f"inputs.{key}.name"} | ({f"inputs.{key}.tooltip"} if options.get("tooltip") else set())
    outputs = zip(node["output"], node["output_name"], node["output_tooltips"], strict=True)
    for i, (kind, name, tooltip) in enumerate(outputs):
        paths |= ({f"outputs.{i}.name"} if name != kind else set()) | ({f"outputs.{i}.tooltip"} if tooltip else set())
    return paths


def leaves(texts: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested texts to path -> text."""
    flat: dict[str, str] = {}
    for key, value in texts.items():
        flat |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat


def test_chinese_has_every_text_of_every_node_and_no_others(schemas: dict[str, Any], served: dict[str, Any]) -> None:
    expected = {f"{name}.{path}" for name, node in schemas.items() for path in wanted(node)}
    translated = set(leaves(served["zh"]["nodeDefs"]))
    assert sorted(expected - translated) == []
    assert sorted(translated - expected) == []


def test_descriptions_and_tooltips_are_chinese(served: dict[str, Any]) -> None:
    """Names may be untranslated terms (rank, cfg), sentences may not."""
    sentences = {p: t for p, t in leaves(served["zh"]["nodeDefs"]).items() if p.endswith((".description", ".tooltip"))}
    assert [path for path, text in sentences.items() if not re.search("[\u4e00-\u9fff]", text)] == []


def test_names_and_descriptions_hold_no_message_syntax(served: dict[str, Any]) -> None:
    """The page parses all texts but tooltips as messages, in which ``{ } @ |`` have a meaning."""
    messages = {p: t for p, t in leaves(served["zh"]["nodeDefs"]).items() if not p.endswith(".tooltip")}
    assert [path for path, text in messages.items() if not text or set("{}@|") & set(text)] == []


def test_own_widgets_have_the_same_texts_in_both_languages(served: dict[str, Any]) -> None:
    en, zh = (
        leaves({key: value for key, value in served[language].items() if key != "nodeDefs"})
        for language in ("en", "zh")
    )
    assert en.keys() == zh.keys()
    placeholders = re.compile(r"\{\w+\}")
    assert {key: sorted(placeholders.findall(text)) for key, text in en.items()} == {
        key: sorted(placeholders.findall(text)) for key, text in zh.items()
    }
