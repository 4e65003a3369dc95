"""Fixtures for the tests of transformers models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Run the test without gradients, unless it enables them."""
    with torch.no_grad():
        yield
