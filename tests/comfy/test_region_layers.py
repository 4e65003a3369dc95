"""Maps on the transformers of ComfyUI's own code; see region_layers.py, which ComfyUI's own Python runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytestmark = pytest.mark.comfy


def test_a_map_acts_where_its_part_of_the_picture_is(measure: Callable[[str], dict[str, Any]]) -> None:
    problems = measure("region_layers.py")
    assert len(problems) == 15
    assert not any(problems.values()), problems
