"""Fixtures for the tests of merge()."""

from __future__ import annotations

import pytest
from legomole.core.adapter import Adapter

from .adapters import named, part


@pytest.fixture
def pair() -> tuple[Adapter, Adapter]:
    """Two adapters that share one module at different ranks and have one each of their own."""
    style = named("style", {"both": part(4, seed=1, alpha=2.0), "only_style": part(2, seed=2)})
    subject = named("subject", {"both": part(2, seed=3, alpha=1.0), "only_subject": part(3, 4, 7, seed=4)})
    return style, subject
