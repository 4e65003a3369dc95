"""Fixtures for trainings of gates."""

from __future__ import annotations

import pytest

from .toy import Toy, toy


@pytest.fixture(scope="module")
def plain() -> Toy:
    """A transformer with two LoRAs."""
    return toy()
