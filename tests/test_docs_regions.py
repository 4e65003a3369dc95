"""The page on regions and steps, carried out after the first block of the page on mixing, on a tiny pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("peft")

from .test_docs import blocks
from .test_docs_mole import folder

__all__ = ["folder"]  # a fixture


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning")
@pytest.mark.filterwarnings("ignore:style. 1 layers belong to text encoders")
def test_the_page_works_from_top_to_bottom(folder: Path) -> None:
    names: dict[str, Any] = {}
    exec(blocks("mole.md", "python")[0], names)
    everywhere = names["image"].tobytes()
    (code,) = blocks("regions.md", "python")
    exec(code, names)
    assert torch.equal(names["left"].mean(), torch.tensor(0.5))
    assert names["image"].tobytes() != everywhere
    assert names["early"].tobytes() == everywhere  # the tiny pipeline takes one step, the first
    exec(code.replace("steps=[(0, 0.4)", "steps=[(0.4, 1)"), names)
    assert names["early"].tobytes() != everywhere
