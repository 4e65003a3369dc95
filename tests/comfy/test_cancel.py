"""Prompts cancelled while they run: the model is unpatched, and the next prompts give the same images as before."""

from __future__ import annotations

import sys
from pathlib import Path
from random import Random

import pytest

from .server import Server

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:  # benchmarks are not part of the package; appended, so that nothing is shadowed
    sys.path.append(str(ROOT))

from benchmarks.reliability import prompts, soak  # noqa: E402

pytestmark = pytest.mark.comfy

PLAIN, MIXED = 0, 6


@pytest.fixture(scope="module")
def before(comfy: Server, files: dict[str, str]) -> dict[int, str]:
    """Images of the model without LoRAs and with a mix."""
    prompts.write_files(comfy.base)
    return {number: soak.sample(comfy, prompts.picture(number)) for number in (PLAIN, MIXED)}


@pytest.mark.parametrize("number", range(4), ids=lambda number: prompts.cancelled(number).kind)
def test_the_next_prompts_give_the_same_images_as_before(comfy: Server, before: dict[int, str], number: int) -> None:
    run = soak.SoakResults()
    soak.cancel(comfy, prompts.cancelled(number), Random(number), run)
    assert run.defects == []
    assert {n: soak.sample(comfy, prompts.picture(n)) for n in before} == before
