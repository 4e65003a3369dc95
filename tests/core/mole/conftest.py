"""Fixtures for mixtures on models."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from .kinds import MODELS


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """Gradients are disabled; tests that take gradients enable them."""
    with torch.no_grad():
        yield


@pytest.fixture(params=MODELS)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """Each kind of model."""
    return MODELS[request.param]()
