"""Maps on the transformers of ComfyUI's own code; see region_layers.py, which ComfyUI's own Python runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="module")
def measured(measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
    return measure("region_layers.py")


@pytest.mark.parametrize(("kind", "count"), [("layers", 19), ("attention", 10)])
def test_maps_act_and_attention_is_read_where_picture_and_text_are(
    measured: dict[str, dict[str, str]], kind: str, count: int
) -> None:
    problems = measured[kind]
    assert len(problems) == count
    assert not any(problems.values()), problems
